"""Shapes of published checkpoints and of EAGLE-3 heads for them."""

from typing import Any

from moespec_jax.config import DecoderConfig, DraftConfig, RopeConfig

_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 150000.0,
}

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
    "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": True,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
    },
    "MiniMax-M2": {
        "model_type": "minimax_m2",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000.0,
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
