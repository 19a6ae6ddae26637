"""Mixtral."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, require_count
from moespec_jax.checkpoint.families.family import Family, TensorNames
from moespec_jax.checkpoint.families.parts import (
    read_common,
    read_experts,
    read_uniform_windows,
    read_window,
    window_fields,
)
from moespec_jax.config import DecoderConfig


def _read_mixtral(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    return DecoderConfig(
        **read_common(fields, rope_theta=1_000_000.0),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "intermediate_size"),
        num_experts=read_experts(fields),
        sparse_layers=(True,) * layers,
        sliding_windows=read_uniform_windows(fields, layers, read_window(fields, None)),
        norm_topk_prob=True,
    )


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    return window_fields(config) | {"num_local_experts": config.num_experts}


MIXTRAL = Family(
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    TensorNames(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    ),
    neutral={"clip_qkv": (), "norm_topk_prob": (True,)},
)
