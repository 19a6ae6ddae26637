"""Parts of a `config.json` that several families have in common, read and written."""

import dataclasses
from typing import Any

from moespec_jax.checkpoint.config_fields import (
    Fields,
    as_count,
    as_number,
    read_count,
    read_flag,
    require,
    require_count,
    shown,
)
from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import UnsupportedConfig


def read_common(
    fields: Fields, rope_theta: float = 10_000.0, partial_rotary: float | None = None, interleaved: bool = False
) -> dict[str, Any]:
    """Read the fields that all families have; `rope_theta` is the family's default, `partial_rotary` as in `read_rope`,
    and `interleaved` whether the family rotates neighbouring dimensions."""
    heads, hidden = require_count([fields], "num_attention_heads"), require_count([fields], "hidden_size")
    return dict(
        model_type=fields["model_type"],
        vocab_size=require_count([fields], "vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=require_count([fields], "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=read_count([fields], "num_key_value_heads", heads),
        head_dim=read_count([fields], "head_dim", hidden // heads),
        num_experts_per_tok=require_count([fields], "num_experts_per_tok"),
        max_position_embeddings=require_count([fields], "max_position_embeddings"),
        rms_norm_eps=as_number("rms_norm_eps", require([fields], "rms_norm_eps")),
        hidden_act=str(fields.get("hidden_act", "silu")),
        tie_word_embeddings=read_flag([fields], "tie_word_embeddings", False),
        rope=dataclasses.replace(read_rope(fields, rope_theta, partial_rotary), interleaved=interleaved),
    )


def read_experts(fields: Fields) -> int:
    """Read the number of experts: `num_local_experts` (Mixtral, and Qwen3-MoE in recent transformers), or
    `num_experts`."""
    return require_count([fields], "num_experts" if fields.get("num_local_experts") is None else "num_local_experts")


def read_sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Read which layers route to experts, by `mlp_only_layers` and `decoder_sparse_step`."""
    dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        raise UnsupportedConfig(f"expected decoder_sparse_step to be a positive integer; config.json has {shown(step)}")
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise UnsupportedConfig(f"expected mlp_only_layers to be a list of integers; config.json has {shown(dense)}")
    dense = set(dense)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def read_window(fields: Fields, default: int | None) -> int:
    """Read the sliding window in tokens, 0 for none."""
    value = fields.get("sliding_window", default)
    return as_count("sliding_window", value) if value else 0


def read_uniform_windows(fields: Fields, layers: int, window: int) -> tuple[int, ...]:
    """Return one window for all layers, for families whose published code does not read `layer_types`."""
    windows = read_windows({}, layers, window)
    if fields.get("layer_types") is not None and read_windows(fields, layers, window) != windows:
        raise UnsupportedConfig(
            f"expected one sliding_window for all layers of {fields['model_type']}; layer_types is"
            f" {shown(fields['layer_types'])}"
        )
    return windows


def read_windows(fields: Fields, layers: int, window: int) -> tuple[int, ...]:
    """Read the window of each layer: `window` where `layer_types` has sliding attention, or there is no such list."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return (window,) * layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise UnsupportedConfig(
            f"expected layer_types to name full or sliding attention for {layers} layers; got {shown(kinds)}"
        )
    if "sliding_attention" in kinds and not window:
        raise UnsupportedConfig("expected a sliding_window for sliding_attention in layer_types; it is not set")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def window_fields(config: DecoderConfig) -> dict[str, Any]:
    """Published fields of windows; `layer_types` only where layers differ."""
    windows = set(config.sliding_windows)
    fields: dict[str, Any] = {"sliding_window": max(windows) or None}
    return fields | (layer_types(config) if len(windows) > 1 else {})


def layer_types(config: DecoderConfig) -> dict[str, Any]:
    """The published list of each layer's attention."""
    return {"layer_types": ["sliding_attention" if w else "full_attention" for w in config.sliding_windows]}


def sparse_fields(config: DecoderConfig) -> dict[str, Any]:
    """Published fields of which layers are dense (Qwen), and of the width of experts."""
    dense = [i for i, sparse in enumerate(config.sparse_layers) if not sparse]
    return {"moe_intermediate_size": config.moe_intermediate_size, "mlp_only_layers": dense, "decoder_sparse_step": 1}
