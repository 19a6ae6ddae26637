"""Families with a sigmoid router whose choice has a correction: GLM-4.5 to 4.7, dots.llm1, Solar-Open, MiniMax-M2 and
Hy3."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, as_number, read_count, read_flag, require_count, shown
from moespec_jax.checkpoint.families.family import HONOURED, Family, TensorNames
from moespec_jax.checkpoint.families.parts import (
    layer_types,
    read_common,
    read_experts,
    read_uniform_windows,
    read_window,
    read_windows,
)
from moespec_jax.config import DecoderConfig, QkNorm, RouterConfig
from moespec_jax.errors import UnsupportedConfig

_EPSILON = 1e-20


def read_deepseek(fields: Fields, shared: int, norm_topk_prob: bool) -> dict[str, Any]:
    """Read the router and the experts of DeepSeek-V3's fields; `shared` is the default number of shared experts."""
    width = require_count([fields], "moe_intermediate_size")
    # 0 stands for none, as null does.
    count = {"n_shared_experts": fields.get("n_shared_experts", shared) or None}
    experts = _routed_experts(fields)
    groups = read_count([fields], "n_group", 1)
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise UnsupportedConfig(
            f"expected n_group to divide {experts} experts into groups of at least 2; config.json has {groups}"
        )
    chosen = read_count([fields], "topk_group", 1)
    if chosen > groups:
        raise UnsupportedConfig(f"expected topk_group of at most n_group {groups}; config.json has {chosen}")
    return dict(
        num_experts=experts,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width * read_count([count], "n_shared_experts", 0),
        shared_expert_gate=False,
        norm_topk_prob=read_flag([fields], "norm_topk_prob", norm_topk_prob),
        router=RouterConfig(
            score="sigmoid",
            correction=True,
            groups=groups,
            groups_per_tok=chosen,
            scale=as_number("routed_scaling_factor", fields.get("routed_scaling_factor", 1.0)),
            norm_epsilon=_EPSILON,
            float32=True,
        ),
    )


def _write_deepseek(config: DecoderConfig) -> dict[str, Any]:
    router, width = config.router, config.moe_intermediate_size
    return {
        "n_routed_experts": config.num_experts,
        "moe_intermediate_size": width,
        "n_shared_experts": config.shared_expert_intermediate_size // width,
        "n_group": router.groups,
        "topk_group": router.groups_per_tok,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": config.norm_topk_prob,
        "attention_bias": config.qkv_bias,
    }


def _routed_experts(fields: Fields) -> int:
    return read_experts({"num_local_experts": fields["n_routed_experts"]} if "n_routed_experts" in fields else fields)


def read_first_dense(fields: Fields, layers: int, default: int) -> tuple[bool, ...]:
    """Read which layers route to experts, all but the first `first_k_dense_replace`."""
    dense = fields.get("first_k_dense_replace", default)
    if type(dense) is not int or dense < 0:
        raise UnsupportedConfig(f"expected first_k_dense_replace of at least 0; config.json has {shown(dense)}")
    return tuple(i >= dense for i in range(layers))


def _dense_fields(config: DecoderConfig) -> dict[str, Any]:
    dense = next((i for i, sparse in enumerate(config.sparse_layers) if sparse), config.num_hidden_layers)
    return {"first_k_dense_replace": dense}


def _read_glm4_moe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    qk_norm: QkNorm = "head" if read_flag([fields], "use_qk_norm", False) else "none"
    return DecoderConfig(
        **read_common(fields, partial_rotary=0.5),
        **read_deepseek(fields, shared=1, norm_topk_prob=True),
        intermediate_size=require_count([fields], "intermediate_size"),
        sparse_layers=read_first_dense(fields, layers, 1),
        sliding_windows=read_uniform_windows(fields, layers, 0),
        qkv_bias=read_flag([fields], "attention_bias", False),
        qk_norm=qk_norm,
    )


def _write_glm4_moe(config: DecoderConfig) -> dict[str, Any]:
    partial = {"partial_rotary_factor": config.rope.partial_rotary_factor}
    return _write_deepseek(config) | _dense_fields(config) | partial | {"use_qk_norm": config.qk_norm == "head"}


def _read_dots1(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    window = read_window(fields, 4096)
    last = fields.get("max_window_layers", 62)
    by_rule = tuple(window if window and i >= last else 0 for i in range(layers))
    bias = read_flag([fields], "attention_bias", False)
    return DecoderConfig(
        **read_common(fields),
        **read_deepseek(fields, shared=0, norm_topk_prob=False),
        intermediate_size=require_count([fields], "intermediate_size"),
        sparse_layers=read_first_dense(fields, layers, 0),
        sliding_windows=read_windows(fields, layers, window) if fields.get("layer_types") else by_rule,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def _write_dots1(config: DecoderConfig) -> dict[str, Any]:
    windows = {"sliding_window": max(config.sliding_windows) or None} | layer_types(config)
    return _write_deepseek(config) | _dense_fields(config) | windows


def _read_solar_open(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    experts = read_deepseek(fields, shared=1, norm_topk_prob=True)
    return DecoderConfig(
        **read_common({"head_dim": 128, **fields}, rope_theta=1_000_000.0),
        **experts,
        intermediate_size=experts["moe_intermediate_size"],
        sparse_layers=(True,) * layers,
        sliding_windows=read_uniform_windows(fields, layers, 0),
        qkv_bias=read_flag([fields], "attention_bias", False),
    )


def _read_minimax_m2(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    head = read_count([fields], "head_dim", 128)
    width = require_count([fields], "intermediate_size")
    partial = read_count([fields], "rotary_dim", head) / head
    return DecoderConfig(
        **read_common({**fields, "head_dim": head}, rope_theta=5_000_000.0, partial_rotary=partial),
        num_experts=read_experts(fields),
        intermediate_size=width,
        moe_intermediate_size=width,
        sparse_layers=(True,) * layers,
        sliding_windows=read_uniform_windows(fields, layers, 0),
        norm_topk_prob=True,
        qk_norm="flat",
        router=RouterConfig(score="sigmoid", correction=True),
    )


def _write_minimax_m2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_experts,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }


def _read_hy_v3(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    bias = read_flag([fields], "attention_bias", False)
    width = require_count([fields], "moe_intermediate_size")
    kinds = fields.get("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
        raise UnsupportedConfig(f"expected mlp_layer_types of {layers} layers; config.json has {shown(kinds)}")
    return DecoderConfig(
        **read_common({"head_dim": 128, **fields}, rope_theta=11_158_840.0),
        num_experts=read_experts(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width * read_count([fields], "num_shared_experts", 1),
        shared_expert_gate=False,
        sparse_layers=tuple(kind == "sparse" for kind in kinds),
        sliding_windows=read_uniform_windows(fields, layers, 0),
        norm_topk_prob=True,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        router=RouterConfig(
            score="sigmoid",
            correction=True,
            scale=as_number("router_scaling_factor", fields.get("router_scaling_factor", 2.826)),
            norm_epsilon=_EPSILON,
            float32=True,
        ),
    )


def _write_hy_v3(config: DecoderConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size,
        "router_scaling_factor": config.router.scale,
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in config.sparse_layers],
        "attention_bias": config.qkv_bias,
    }


# Fields of these families, and values of others that change nothing in them.
_SIGMOID = {"clip_qkv": (), "scoring_func": ("sigmoid",), "score_function": ("sigmoid",)}
_DEEPSEEK = _SIGMOID | {
    "routed_scaling_factor": HONOURED,
    "n_group": HONOURED,
    "topk_group": HONOURED,
    "topk_method": ("noaux_tc",),
}
GLM4_MOE = Family("Glm4MoeForCausalLM", _read_glm4_moe, _write_glm4_moe, mtp=True, neutral=_DEEPSEEK)
DOTS1 = Family("Dots1ForCausalLM", _read_dots1, _write_dots1, neutral=_DEEPSEEK)
SOLAR_OPEN = Family("SolarOpenForCausalLM", _read_solar_open, _write_deepseek, neutral=_DEEPSEEK)
MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM",
    _read_minimax_m2,
    _write_minimax_m2,
    TensorNames(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
        correction="block_sparse_moe.e_score_correction_bias",
    ),
    neutral=_SIGMOID | {"rotary_dim": HONOURED, "norm_topk_prob": (True,)},
)
HY_V3 = Family(
    "HYV3ForCausalLM",
    _read_hy_v3,
    _write_hy_v3,
    TensorNames(router="mlp.router.gate.weight", correction="mlp.expert_bias", shared="mlp.shared_mlp."),
    mtp=True,
    neutral=_SIGMOID | {"router_scaling_factor": HONOURED, "norm_topk_prob": (True,), "mlp_bias": (False,)},
)
