"""Families that mix layers of full attention with layers of windows, each with its own rotary embedding or none:
Mellum2, EXAONE-MoE, AFMoE (Trinity) and Laguna."""

import dataclasses
from collections.abc import Callable
from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, as_number, read_count, read_flag, require_count, shown
from moespec_jax.checkpoint.families.family import HONOURED, Family, TensorNames
from moespec_jax.checkpoint.families.parts import layer_types, read_common, read_experts, read_window, read_windows
from moespec_jax.checkpoint.families.sigmoid import read_deepseek, read_first_dense
from moespec_jax.checkpoint.rope import read_rope, rope_of_layers
from moespec_jax.config import DecoderConfig, RouterConfig
from moespec_jax.errors import UnsupportedConfig

_EPSILON = 1e-20


def _read_mellum(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    bias = read_flag([fields], "attention_bias", False)
    return DecoderConfig(
        **read_common(rope_of_layers(fields, "full_attention"), rope_theta=500_000.0),
        sliding_rope=read_rope(rope_of_layers(fields, "sliding_attention"), 10_000.0),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "moe_intermediate_size"),
        num_experts=read_experts(fields),
        sparse_layers=_read_mlp_types(fields, layers, dense=0),
        sliding_windows=_read_kinds(fields, layers, 1024, _all_full),
        norm_topk_prob=read_flag([fields], "norm_topk_prob", True),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def _write_mellum(config: DecoderConfig) -> dict[str, Any]:
    fields = {"norm_topk_prob": config.norm_topk_prob, "attention_bias": config.qkv_bias}
    return fields | _kind_fields(config)


def _read_exaone_moe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    pattern, given = fields.get("sliding_window_pattern", 4), fields.get("layer_types") is not None
    if read_window(fields, 4096) and not given and (type(pattern) is not int or pattern < 1):
        raise UnsupportedConfig(
            f"expected layer_types, or sliding_window_pattern of at least 1; config.json has {shown(pattern)}"
        )
    windows = _read_kinds(fields, layers, 4096, lambda i: (i + 1) % pattern == 0)
    experts = read_deepseek({**fields, "n_shared_experts": fields.get("num_shared_experts", 1)}, 1, True)
    scale = as_number("routed_scaling_factor", fields.get("routed_scaling_factor", 2.5))
    return DecoderConfig(
        **read_common(fields),
        **experts | {"router": dataclasses.replace(experts["router"], scale=scale)},
        intermediate_size=require_count([fields], "intermediate_size"),
        sparse_layers=_read_mlp_types(fields, layers, fields.get("first_k_dense_replace", 1)),
        sliding_windows=windows,
        # Where there are windows at all, layers without one have no rotary embedding.
        rope_layers=tuple(window > 0 for window in windows) if read_window(fields, 4096) else (),
        qk_norm="head",
    )


def _write_exaone_moe(config: DecoderConfig) -> dict[str, Any]:
    router, width = config.router, config.moe_intermediate_size
    return _kind_fields(config) | {
        "num_shared_experts": config.shared_expert_intermediate_size // width,
        "n_group": router.groups,
        "topk_group": router.groups_per_tok,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": config.norm_topk_prob,
        # A window of no layer: without one, all layers would have rotary embedding.
        "sliding_window": max(config.sliding_windows) or (4096 if config.rope_layers else None),
    }


def _read_afmoe(fields: Fields) -> DecoderConfig:
    layers, hidden = (require_count([fields], name) for name in ("num_hidden_layers", "hidden_size"))
    every = read_count([fields], "global_attn_every_n_layers", 4)
    windows = _read_kinds(fields, layers, 1024, lambda i: (i + 1) % every == 0)
    width = require_count([fields], "moe_intermediate_size")
    bias, mup = (read_flag([fields], name, False) for name in ("attention_bias", "mup_enabled"))
    return DecoderConfig(
        **read_common({"head_dim": 128, **fields}),
        num_experts=read_experts(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width * read_count([fields], "num_shared_experts", 2),
        shared_expert_gate=False,
        sparse_layers=read_first_dense({"first_k_dense_replace": fields.get("num_dense_layers", 1)}, layers, 1),
        sliding_windows=windows,
        rope_layers=tuple(window > 0 for window in windows),
        norm_topk_prob=True,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        output_gate="sigmoid",
        output_norms=True,
        embedding_multiplier=hidden**0.5 if mup else 1.0,
        router=RouterConfig(
            score="sigmoid",
            correction=True,
            scale=as_number("route_scale", fields.get("route_scale", 1.0)),
            norm_epsilon=_EPSILON,
        ),
    )


def _write_afmoe(config: DecoderConfig) -> dict[str, Any]:
    dense = next((i for i, sparse in enumerate(config.sparse_layers) if sparse), config.num_hidden_layers)
    return layer_types(config) | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size,
        "num_dense_layers": dense,
        "sliding_window": max(config.sliding_windows) or None,
        "attention_bias": config.qkv_bias,
        "mup_enabled": config.embedding_multiplier != 1.0,
        "route_scale": config.router.scale,
    }


def _read_laguna(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    full, local = (rope_of_layers(fields, f"{kind}_attention") for kind in ("full", "sliding"))
    bias, gating = read_flag([fields], "attention_bias", False), fields.get("gating", True)
    if not isinstance(gating, bool) and gating not in ("per-head", "per-element"):
        raise UnsupportedConfig(f"expected gating per-head or per-element; config.json has {shown(gating)}")
    return DecoderConfig(
        **read_common({"head_dim": 128, **full}, rope_theta=500_000.0, partial_rotary=0.5),
        sliding_rope=read_rope(local, 10_000.0, 1.0),
        num_experts=read_experts(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "moe_intermediate_size"),
        shared_expert_intermediate_size=require_count([fields], "shared_expert_intermediate_size"),
        shared_expert_gate=False,
        sparse_layers=_read_mlp_types(fields, layers, dense=1),
        sliding_windows=_read_kinds(fields, layers, 512, _all_full),
        layer_heads=_read_heads(fields, layers),
        norm_topk_prob=True,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        output_gate="softplus",
        output_gate_per_head=gating in (True, "per-head"),
        router=RouterConfig(
            score="sigmoid",
            correction=True,
            scale=as_number("moe_routed_scaling_factor", fields.get("moe_routed_scaling_factor", 1.0)),
        ),
    )


def _write_laguna(config: DecoderConfig) -> dict[str, Any]:
    return _kind_fields(config) | {
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "num_attention_heads_per_layer": list(config.layer_heads) or None,
        "attention_bias": config.qkv_bias,
        "gating": "per-head" if config.output_gate_per_head else "per-element",
        "moe_routed_scaling_factor": config.router.scale,
    }


def _read_heads(fields: Fields, layers: int) -> tuple[int, ...]:
    """Read the number of query heads of each layer; empty where it is the same for all."""
    heads = fields.get("num_attention_heads_per_layer")
    if heads is None:
        return ()
    kv = read_count([fields], "num_key_value_heads", 1)
    if not isinstance(heads, list) or len(heads) != layers or any(type(n) is not int or n < 1 or n % kv for n in heads):
        raise UnsupportedConfig(
            f"expected num_attention_heads_per_layer to list multiples of num_key_value_heads {kv} for {layers} layers;"
            f" config.json has {shown(heads)}"
        )
    return () if set(heads) == {fields["num_attention_heads"]} else tuple(heads)


def _all_full(layer: int) -> bool:
    """Rule of families whose layers have full attention by default."""
    return True


def _read_kinds(fields: Fields, layers: int, default: int, is_full: Callable[[int], bool]) -> tuple[int, ...]:
    """Read the window of each layer by `layer_types`; without that list, `is_full` is the family's rule."""
    window = read_window(fields, default)
    by_rule = ["full_attention" if not window or is_full(i) else "sliding_attention" for i in range(layers)]
    return read_windows({"layer_types": fields.get("layer_types") or by_rule}, layers, window)


def _read_mlp_types(fields: Fields, layers: int, dense: int) -> tuple[bool, ...]:
    """Read which layers route to experts, by `mlp_layer_types`; by default all but the first `dense`."""
    kinds = fields.get("mlp_layer_types")
    if kinds is None:
        return tuple(i >= dense for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
        raise UnsupportedConfig(
            f"expected mlp_layer_types to name dense or sparse for {layers} layers; config.json has {shown(kinds)}"
        )
    return tuple(kind == "sparse" for kind in kinds)


def _kind_fields(config: DecoderConfig) -> dict[str, Any]:
    """Published fields of experts and of the kinds of layers."""
    return layer_types(config) | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "sliding_window": max(config.sliding_windows) or None,
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in config.sparse_layers],
    }


# Fields that these families read, and values of others that change nothing in them.
_SIGMOID = {"clip_qkv": (), "scoring_func": ("sigmoid",), "score_function": ("sigmoid",), "score_func": ("sigmoid",)}
MELLUM = Family("MellumForCausalLM", _read_mellum, _write_mellum, neutral={"clip_qkv": ()})
EXAONE_MOE = Family(
    "ExaoneMoeForCausalLM",
    _read_exaone_moe,
    _write_exaone_moe,
    TensorNames(correction="mlp.e_score_correction_bias"),
    neutral=_SIGMOID
    | dict.fromkeys(("routed_scaling_factor", "n_group", "topk_group", "sliding_window_pattern"), HONOURED)
    | {"topk_method": ("noaux_tc",)},
)
AFMOE = Family(
    "AfmoeForCausalLM",
    _read_afmoe,
    _write_afmoe,
    TensorNames(router="mlp.router.gate.weight", correction="mlp.expert_bias"),
    neutral=_SIGMOID | {"route_scale": HONOURED, "route_norm": (True,), "norm_topk_prob": (True,)},
)
LAGUNA = Family(
    "LagunaForCausalLM",
    _read_laguna,
    _write_laguna,
    TensorNames(
        correction="mlp.experts.e_score_correction_bias",
        shared="mlp.shared_expert.",
        attention={"self_attn.gate_proj.weight": "self_attn.g_proj.weight"},
    ),
    neutral=_SIGMOID
    | {
        "norm_topk_prob": (True,),
        "moe_router_logit_softcapping": (0,),
        "moe_apply_router_weight_on_input": (False,),
    },
)
