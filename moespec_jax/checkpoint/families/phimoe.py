"""Phi-3.5-MoE."""

from typing import Any

from moespec_jax.checkpoint.config_fields import (
    Fields,
    as_count,
    as_number,
    read_flag,
    require_count,
    section,
    shown,
)
from moespec_jax.checkpoint.families.family import Family, TensorNames
from moespec_jax.checkpoint.families.parts import (
    read_common,
    read_experts,
    read_uniform_windows,
    read_window,
    window_fields,
)
from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.config import DecoderConfig, RopeConfig, RouterConfig
from moespec_jax.errors import UnsupportedConfig

_THETA = 1_000_000.0
_STATEMENTS = ("rope_parameters", "rope_scaling")
# Parameters of longrope; the published code has its mscales in place of an attention factor.
_LONGROPE = {
    *("rope_type", "type", "rope_theta", "original_max_position_embeddings", "factor", "attention_factor"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
}


def _read_phimoe(fields: Fields) -> DecoderConfig:
    layers, width = require_count([fields], "num_hidden_layers"), require_count([fields], "intermediate_size")
    common = read_common({name: value for name, value in fields.items() if name not in _STATEMENTS})
    common["rope"] = _read_rotary(fields, common["head_dim"])
    if common["num_experts_per_tok"] != 2:
        raise UnsupportedConfig(
            f"expected num_experts_per_tok 2, which sparsemixer chooses; config.json has"
            f" {common['num_experts_per_tok']}"
        )
    jitter, bias = fields.get("router_jitter_noise", 0.01), read_flag([fields], "attention_bias", False)
    return DecoderConfig(
        **common,
        intermediate_size=width,
        moe_intermediate_size=width,
        num_experts=read_experts(fields),
        sparse_layers=(True,) * layers,
        sliding_windows=read_uniform_windows(fields, layers, read_window(fields, None)),
        norm_topk_prob=False,
        qkv_bias=bias,
        o_bias=bias,
        layer_norms=True,
        lm_head_bias=read_flag([fields], "lm_head_bias", False),
        router=RouterConfig(
            score="sparsemixer", jitter=as_number("router_jitter_noise", jitter) if jitter != 0 else 0.0
        ),
    )


def _read_rotary(fields: Fields, head_dim: int) -> RopeConfig:
    """Read rotary settings, of the types that the published code computes: default and longrope."""
    stated = [given for name in _STATEMENTS if (given := section(fields, name))]
    long = [given for given in stated if (given.get("rope_type") or given.get("type")) == "longrope"]
    if not long:
        rope = read_rope(fields, _THETA)
        if rope.rope_type != "default":
            raise UnsupportedConfig(f"expected rope_type default or longrope; config.json has {shown(rope.rope_type)}")
        return rope
    read = {_read_longrope(given, fields, head_dim) for given in long}
    if len(long) < len(stated) or len(read) > 1:
        raise UnsupportedConfig(f"expected rope_parameters and rope_scaling to agree; config.json has {shown(stated)}")
    return read.pop()


def _read_longrope(given: Fields, fields: Fields, head_dim: int) -> RopeConfig:
    """Read rotary settings with two sets of factors, for contexts up to the original one and for longer ones."""
    if unknown := set(given) - _LONGROPE:
        name = min(unknown)
        raise UnsupportedConfig(
            f"unknown rope parameter {shown(name)} for rope_type 'longrope'; config.json has {shown(given[name])}"
        )
    for name in ("short_factor", "long_factor"):
        if not isinstance(given.get(name), list | tuple) or len(given[name]) != head_dim // 2:
            raise UnsupportedConfig(
                f"expected {name} to list {head_dim // 2} numbers; config.json has {shown(given.get(name))}"
            )
    original = fields.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    theta = given.get("rope_theta") or fields.get("rope_theta") or _THETA
    return RopeConfig(
        rope_type="longrope",
        rope_theta=as_number("rope_theta", theta),
        original_max_position_embeddings=as_count("original_max_position_embeddings", original),
        short_factor=tuple(as_number("short_factor", value) for value in given["short_factor"]),
        long_factor=tuple(as_number("long_factor", value) for value in given["long_factor"]),
        short_mscale=as_number("short_mscale", given.get("short_mscale")),
        long_mscale=as_number("long_mscale", given.get("long_mscale")),
    )


def _write_phimoe(config: DecoderConfig) -> dict[str, Any]:
    return window_fields(config) | {
        "num_local_experts": config.num_experts,
        "attention_bias": config.qkv_bias,
        "lm_head_bias": config.lm_head_bias,
        "router_jitter_noise": config.router.jitter,
    }


PHIMOE = Family(
    "PhimoeForCausalLM",
    _read_phimoe,
    _write_phimoe,
    TensorNames(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    ),
    neutral={"clip_qkv": (), "norm_topk_prob": (False,), "scoring_func": ()},
)
