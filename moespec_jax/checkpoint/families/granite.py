"""Granite-MoE, without and with a shared expert."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, read_count, read_flag, read_number, require_count
from moespec_jax.checkpoint.families.family import HONOURED, Family, FusedForm, TensorNames
from moespec_jax.checkpoint.families.parts import read_common, read_experts, read_uniform_windows
from moespec_jax.config import DecoderConfig

_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def _read_granite(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    width, bias = require_count([fields], "intermediate_size"), read_flag([fields], "attention_bias", False)
    multipliers: dict[str, Any] = {name: read_number([fields], name, 1.0) for name in _MULTIPLIERS}
    shared = {"shared_intermediate_size": fields.get("shared_intermediate_size") or None}  # 0 stands for none
    return DecoderConfig(
        **read_common(fields),
        **multipliers,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_experts=read_experts(fields),
        shared_expert_intermediate_size=read_count([shared], "shared_intermediate_size", 0),
        shared_expert_gate=False,
        sparse_layers=(True,) * layers,
        sliding_windows=read_uniform_windows(fields, layers, 0),
        # The softmax over a token's experts is that over all, renormalised.
        norm_topk_prob=True,
        qkv_bias=bias,
        o_bias=bias,
    )


def _write_granite(config: DecoderConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(config, name) for name in _MULTIPLIERS}
    return fields | {"num_local_experts": config.num_experts, "attention_bias": config.qkv_bias}


def _write_granite_shared(config: DecoderConfig) -> dict[str, Any]:
    return _write_granite(config) | {"shared_intermediate_size": config.shared_expert_intermediate_size}


_NAMES = TensorNames(
    router="block_sparse_moe.router.layer.weight",
    gate="block_sparse_moe.experts.{expert}.gate_proj.weight",
    up="block_sparse_moe.experts.{expert}.up_proj.weight",
    down="block_sparse_moe.experts.{expert}.down_proj.weight",
    shared="shared_mlp.",
)
_FUSED = FusedForm(
    published=True,
    gate_up="input_linear.weight",
    down="output_linear.weight",
    shared_gate_up="shared_mlp.input_linear.weight",
    shared_down="shared_mlp.output_linear.weight",
)
_NEUTRAL = {"clip_qkv": (), "norm_topk_prob": (True,)} | dict.fromkeys(_MULTIPLIERS, HONOURED)
GRANITE = Family(
    "GraniteMoeForCausalLM",
    _read_granite,
    _write_granite,
    _NAMES,
    _FUSED,
    neutral=_NEUTRAL | {"shared_intermediate_size": (0,)},
)
GRANITE_SHARED = Family(
    "GraniteMoeSharedForCausalLM", _read_granite, _write_granite_shared, _NAMES, _FUSED, neutral=_NEUTRAL
)
