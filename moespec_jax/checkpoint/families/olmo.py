"""OLMoE and FlexOlmo."""

import dataclasses
from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, as_number, read_flag, require_count
from moespec_jax.checkpoint.families.family import Family, TensorNames
from moespec_jax.checkpoint.families.parts import read_common, read_experts, read_uniform_windows, window_fields
from moespec_jax.config import DecoderConfig


def _read_olmoe(fields: Fields, rope_theta: float = 10_000.0) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    bias = read_flag([fields], "attention_bias", False)
    clip = fields.get("clip_qkv")
    return DecoderConfig(
        **read_common(fields, rope_theta),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "intermediate_size"),
        num_experts=read_experts(fields),
        sparse_layers=(True,) * layers,
        # The published code has no windows, regardless of sliding_window.
        sliding_windows=read_uniform_windows(fields, layers, 0),
        norm_topk_prob=read_flag([fields], "norm_topk_prob", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="flat",
        clip_qkv=None if clip is None else as_number("clip_qkv", clip),
    )


def _write_olmoe(config: DecoderConfig) -> dict[str, Any]:
    fields = window_fields(config) | {"num_experts": config.num_experts, "norm_topk_prob": config.norm_topk_prob}
    return fields | {"attention_bias": config.qkv_bias, "clip_qkv": config.clip_qkv}


def _read_flex_olmo(fields: Fields) -> DecoderConfig:
    """Read OLMoE's fields: the outputs of blocks are normed in place of their inputs."""
    return dataclasses.replace(_read_olmoe(fields, 500_000.0), input_norms=False, output_norms=True)


OLMOE = Family("OlmoeForCausalLM", _read_olmoe, _write_olmoe)
FLEX_OLMO = Family(
    "FlexOlmoForCausalLM",
    _read_flex_olmo,
    _write_olmoe,
    TensorNames(attention={"post_mlp_layernorm.weight": "post_feedforward_layernorm.weight"}),
    neutral={"clip_qkv": ()},
)
