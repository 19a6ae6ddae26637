"""HunYuan-MoE v1."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, as_number, read_count, read_flag, require_count, section, shown
from moespec_jax.checkpoint.families.family import Family, TensorNames
from moespec_jax.checkpoint.families.parts import read_common, read_uniform_windows
from moespec_jax.config import DecoderConfig, RouterConfig
from moespec_jax.errors import UnsupportedConfig

# Fields that vendors' files state for each layer, with the value that this family's code computes.
_SAME_EVERYWHERE = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")


def _read_hunyuan(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    fields = _static_rope(fields) | {name: _same(fields, name) for name in _SAME_EVERYWHERE}
    width, bias = require_count([fields], "intermediate_size"), read_flag([fields], "attention_bias", False)
    for name, expected in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if fields[name] not in (None, expected):
            raise UnsupportedConfig(f"expected {name} {expected} in every layer; config.json has {shown(fields[name])}")
    active = read_count([fields], "moe_topk", fields.get("num_experts_per_tok", 1))
    return DecoderConfig(
        **read_common(fields | {"num_experts_per_tok": active}),
        intermediate_size=width,
        moe_intermediate_size=width,
        num_experts=require_count([fields], "num_experts"),
        shared_expert_intermediate_size=width,
        shared_expert_gate=False,
        sparse_layers=(True,) * layers,
        sliding_windows=read_uniform_windows(fields, layers, 0),
        norm_topk_prob=True,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="rotated",
        router=RouterConfig(float32=True),
    )


def _same(fields: Fields, name: str) -> Any:
    """Return the one value that a field has for all layers."""
    value = fields.get(name)
    if not isinstance(value, list):
        return value
    if not value or any(other != value[0] for other in value):
        raise UnsupportedConfig(f"expected one {name} for all layers; config.json has {shown(value)}")
    return value[0]


def _static_rope(fields: Fields) -> dict[str, Any]:
    """Convert rotary settings with an `alpha`, which only stretches the base, to default ones of that base."""
    fields = dict(fields)
    for name in ("rope_parameters", "rope_scaling"):
        given = section(fields, name)
        if "alpha" not in given or not given["alpha"]:
            continue
        alpha, kind = as_number("alpha", given["alpha"]), given.get("rope_type") or given.get("type")
        if kind != "dynamic":
            raise UnsupportedConfig(f"expected rope_type 'dynamic' beside alpha; config.json has {shown(kind)}")
        head = read_count([fields], "head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        theta = as_number("rope_theta", given.get("rope_theta") or fields.get("rope_theta") or 10_000.0)
        fields[name] = {"rope_type": "default", "rope_theta": theta * alpha ** (head / (head - 2))}
    return fields


def _write_hunyuan(config: DecoderConfig) -> dict[str, Any]:
    fields = {"num_experts": config.num_experts, "moe_topk": config.num_experts_per_tok}
    return fields | {"attention_bias": config.qkv_bias}


HUNYUAN = Family(
    "HunYuanMoEV1ForCausalLM",
    _read_hunyuan,
    _write_hunyuan,
    TensorNames(
        router="mlp.gate.wg.weight",
        shared="mlp.shared_mlp.",
        attention={
            "self_attn.q_norm.weight": "self_attn.query_layernorm.weight",
            "self_attn.k_norm.weight": "self_attn.key_layernorm.weight",
        },
    ),
    neutral={
        "clip_qkv": (),
        "use_qk_norm": (True,),
        "use_cla": (False,),
        "use_mla": (False,),
        "use_mixed_mlp_moe": (True,),
        "moe_layer_num_skipped": (0,),
        "norm_topk_prob": (True,),
    },
)
