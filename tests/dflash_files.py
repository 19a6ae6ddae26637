"""DFlash and DSpark heads on disk in the three published formats, spelled out without the library's own tables."""

from pathlib import Path
from typing import Any

import numpy as np
from draft_heads import write_head

from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.dflash import DFlashHead

Fields = dict[str, Any]


def published_tensors(config: DFlashConfig, head: DFlashHead, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters under their published names; projections are `[out, in]`."""
    named: dict[str, Any] = {
        "fc.weight": head.fc.T,
        "hidden_norm.weight": head.hidden_norm,
        "norm.weight": head.norm,
        "lm_head.weight": head.lm_head,
        "embed_tokens.weight": head.embed,
    }
    for i, layer in enumerate(head.layers):
        a, m, at = layer.attention, layer.mlp, f"layers.{i}."
        named |= {f"{at}input_layernorm.weight": layer.input_norm}
        named |= {f"{at}post_attention_layernorm.weight": layer.post_attention_norm}
        named |= {f"{at}self_attn.{n}_proj.weight": getattr(a, n) for n in "qkv"}
        named |= {f"{at}self_attn.o_proj.weight": a.o.T}
        named |= {f"{at}self_attn.{n}_proj.bias": getattr(a, f"{n}_bias") for n in "qkvo"}
        named |= {f"{at}self_attn.{n}.weight": getattr(a, n) for n in ("q_norm", "k_norm")}
        named |= {f"{at}mlp.{n}_proj.weight": getattr(m, n).T for n in ("gate", "up", "down")}
    if head.markov is not None:
        named["markov_head.markov_w1.weight"] = head.markov.previous
        named["markov_head.markov_w2.weight"] = head.markov.following
        if head.markov.mixer is not None:
            name = "gate_proj" if config.markov == "gated" else "joint_proj"
            named[f"markov_head.{name}.weight"] = head.markov.mixer.T
            named[f"markov_head.{name}.bias"] = head.markov.mixer_bias
    if head.confidence is not None:
        named["confidence_head.proj.weight"] = head.confidence.weight
        named["confidence_head.proj.bias"] = head.confidence.bias
    tensors = {prefix + name: np.asarray(value) for name, value in named.items() if value is not None}
    if config.draft_vocab_size < config.vocab_size:
        ids = np.asarray(head.target_ids).astype(np.int64)
        chosen = np.zeros(config.vocab_size, bool)
        chosen[ids] = True
        tensors |= {"d2t": ids - np.arange(len(ids)), "t2d": chosen}
    return tensors


def layer_fields(config: DFlashConfig) -> Fields:
    """Fields of the layers, as transformers' Qwen3Config."""
    windows = [window for window in config.sliding_windows if window]
    return {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope.rope_theta,
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in config.sliding_windows],
    }


def zlab_fields(config: DFlashConfig, **changes: Any) -> Fields:
    nested = {"mask_token_id": config.mask_token_id, "target_layer_ids": [b - 1 for b in config.boundaries]}
    fields = layer_fields(config) | {"architectures": ["DFlashDraftModel"], "block_size": config.block_size}
    return fields | {"dflash_config": nested} | changes


def spark_fields(config: DFlashConfig) -> Fields:
    return {
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla" if config.markov == "none" else config.markov,
        "enable_confidence_head": config.confidence != "none",
        "confidence_head_with_markov": config.confidence == "hidden and markov",
    }


def deepspec_fields(config: DFlashConfig, **changes: Any) -> Fields:
    own = {"architectures": ["Qwen3DSparkModel"], "block_size": config.block_size, "num_anchors": 512}
    ids = {"mask_token_id": config.mask_token_id, "target_layer_ids": [b - 1 for b in config.boundaries]}
    return layer_fields(config) | own | ids | spark_fields(config) | changes


def speculators_fields(config: DFlashConfig, **changes: Any) -> Fields:
    spark = config.markov != "none" or config.confidence != "none"
    fields = {
        "architectures": ["DSparkSpeculator" if spark else "DFlashSpeculator"],
        "speculators_model_type": "dspark" if spark else "dflash",
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "aux_hidden_state_layer_ids": list(config.boundaries),
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not any(config.causal),
        "transformer_layer_config": layer_fields(config),
    }
    return fields | (spark_fields(config) if spark else {}) | changes


def write_block_head(directory: Path, fields: Fields, config: DFlashConfig, head: DFlashHead, **changes: Any) -> Path:
    """A head's directory; `changes` are tensors that replace or (None) remove others, `__` for a dot."""
    edited = published_tensors(config, head) | {name.replace("__", "."): value for name, value in changes.items()}
    return write_head(directory, fields, {name: value for name, value in edited.items() if value is not None})
