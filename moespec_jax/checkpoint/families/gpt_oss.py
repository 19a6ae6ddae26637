"""gpt-oss."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, read_flag, read_number, require_count
from moespec_jax.checkpoint.families.family import HONOURED, Family, FusedForm, TensorNames
from moespec_jax.checkpoint.families.parts import layer_types, read_common, read_experts, read_window, read_windows
from moespec_jax.config import ClampedSwiglu, DecoderConfig

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_gpt_oss(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    bias = read_flag([fields], "attention_bias", True)
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields = {**fields, "rope_parameters": _ROPE}
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    kinds = {"layer_types": fields.get("layer_types") or alternating}
    ffn = require_count([fields], "intermediate_size")
    return DecoderConfig(
        **read_common(fields, rope_theta=150_000.0),
        intermediate_size=ffn,
        moe_intermediate_size=ffn,
        num_experts=read_experts(fields),
        sparse_layers=(True,) * layers,
        sliding_windows=read_windows(kinds, layers, read_window(fields, 128)),
        # The softmax over a token's experts is that over all, renormalised.
        norm_topk_prob=True,
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
        router_bias=True,
        expert_bias=True,
        clamped_swiglu=ClampedSwiglu(
            read_number([fields], "swiglu_alpha", 1.702), read_number([fields], "swiglu_limit", 7.0)
        ),
    )


def _write_gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    activation = config.clamped_swiglu or ClampedSwiglu()
    fields = {"num_local_experts": config.num_experts, "attention_bias": config.qkv_bias}
    fields |= {"sliding_window": max(config.sliding_windows) or None} | layer_types(config)
    return fields | {"swiglu_alpha": activation.alpha, "swiglu_limit": activation.limit}


GPT_OSS = Family(
    "GptOssForCausalLM",
    _read_gpt_oss,
    _write_gpt_oss,
    TensorNames(router="mlp.router.weight"),
    FusedForm(in_first=True, interleaved=True, published=True),
    # The experts' activation is their own, and routing is always renormalised.
    neutral={
        "clip_qkv": (),
        "norm_topk_prob": (True,),
        "hidden_act": ("silu",),
        "swiglu_limit": HONOURED,
        "swiglu_alpha": HONOURED,
    },
)
