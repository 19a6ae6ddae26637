"""Shapes of published checkpoints and of EAGLE-3 heads for them."""

from typing import Any

from moespec_jax.config import DecoderConfig, DraftConfig, RopeConfig

MODELS: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}

# Qwen3's are as in SpecForge's configuration; the widths of the others are assumed, their heads were not available.
HEADS: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {"intermediate_size": 8192, "boundaries": (2, 8, 15)},
    "Qwen3-30B-A3B": {"intermediate_size": 12288, "boundaries": (2, 24, 45)},
    "Qwen3-235B-A22B": {"intermediate_size": 24576, "boundaries": (2, 47, 91)},
    "Mixtral-8x7B": {"intermediate_size": 14336, "boundaries": (2, 16, 29)},
}


def draft_config(model: str, target: DecoderConfig, **changes: Any) -> DraftConfig:
    """Configure a head with the target's hidden size and attention heads.

    Args:
        model: key of `HEADS`; for any other name, the head has the width of speculators' heads and EAGLE-3's
            boundaries.
        target: config of the target, which may have fewer layers than the published one.
        **changes: fields of `DraftConfig` that replace these.
    """
    fields: dict[str, Any] = dict(
        vocab_size=target.vocab_size,
        draft_vocab_size=min(32000, target.vocab_size),
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        rope=RopeConfig(rope_theta=target.rope.rope_theta),
    )
    layers = target.num_hidden_layers
    usual = {
        "intermediate_size": 3 * target.hidden_size,
        "boundaries": (min(2, layers), layers // 2, max(layers - 3, 0)),
    }
    return DraftConfig(**(fields | HEADS.get(model, usual) | changes))
