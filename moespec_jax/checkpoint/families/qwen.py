"""Qwen2-MoE and Qwen3-MoE."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, read_flag, require_count
from moespec_jax.checkpoint.families.family import Family, TensorNames
from moespec_jax.checkpoint.families.parts import (
    layer_types,
    read_common,
    read_experts,
    read_sparse_layers,
    read_uniform_windows,
    read_window,
    read_windows,
    sparse_fields,
    window_fields,
)
from moespec_jax.config import DecoderConfig


def _read_qwen2_moe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    window = read_window(fields, 4096) if read_flag([fields], "use_sliding_window", False) else 0
    below = fields.get("max_window_layers", 28)
    # This family's published rule without `layer_types`: every other layer below max_window_layers has the window.
    by_rule = tuple(window if window and i % 2 == 0 and i < below else 0 for i in range(layers))
    return DecoderConfig(
        **read_common(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "moe_intermediate_size"),
        num_experts=read_experts(fields),
        sparse_layers=read_sparse_layers(fields, layers),
        sliding_windows=read_windows(fields, layers, window) if fields.get("layer_types") else by_rule,
        norm_topk_prob=read_flag([fields], "norm_topk_prob", False),
        qkv_bias=read_flag([fields], "qkv_bias", True),
        shared_expert_intermediate_size=require_count([fields], "shared_expert_intermediate_size"),
    )


def _read_qwen3_moe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    window = read_window(fields, 4096) if read_flag([fields], "use_sliding_window", False) else 0
    bias = read_flag([fields], "attention_bias", False)
    return DecoderConfig(
        **read_common(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "moe_intermediate_size"),
        num_experts=read_experts(fields),
        sparse_layers=read_sparse_layers(fields, layers),
        sliding_windows=read_uniform_windows(fields, layers, window),
        norm_topk_prob=read_flag([fields], "norm_topk_prob", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def _write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    fields = _write_windows(config) | sparse_fields(config)
    # Without a list, windows alternate.
    fields |= layer_types(config)
    fields |= {"num_experts": config.num_experts, "norm_topk_prob": config.norm_topk_prob, "qkv_bias": config.qkv_bias}
    return fields | {"shared_expert_intermediate_size": config.shared_expert_intermediate_size}


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    fields = _write_windows(config) | sparse_fields(config)
    fields |= {"num_experts": config.num_experts, "norm_topk_prob": config.norm_topk_prob}
    return fields | {"attention_bias": config.qkv_bias}


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    return window_fields(config) | {"use_sliding_window": any(config.sliding_windows)}


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    _read_qwen2_moe,
    _write_qwen2_moe,
    TensorNames(shared="mlp.shared_expert."),
    neutral={"clip_qkv": ()},
)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, neutral={"clip_qkv": ()})
