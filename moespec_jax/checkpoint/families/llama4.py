"""The text model of Llama 4."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, as_count, read_count, read_flag, read_number, shown
from moespec_jax.checkpoint.families.family import HONOURED, Family, FusedForm, TensorNames
from moespec_jax.checkpoint.families.parts import read_common
from moespec_jax.config import DecoderConfig, QueryScale, RouterConfig
from moespec_jax.errors import UnsupportedConfig


def _read_llama4(fields: Fields) -> DecoderConfig:
    common = read_common({"head_dim": 128, **fields}, 500_000.0, interleaved=True)
    layers, width = common["num_hidden_layers"], read_count([fields], "intermediate_size", 8192)
    rotates = _read_rotates(fields, layers)
    bias = read_flag([fields], "attention_bias", False)
    return DecoderConfig(
        **common,
        intermediate_size=read_count([fields], "intermediate_size_mlp", 16384),
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
        shared_expert_gate=False,
        num_experts=read_count([fields], "num_local_experts", 16),
        sparse_layers=_read_sparse_layers(fields, layers),
        sliding_windows=(0,) * layers,
        rope_layers=rotates,
        attention_chunks=_read_chunks(fields, rotates),
        query_scale=_read_query_scale(fields),
        norm_topk_prob=False,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="unit" if read_flag([fields], "use_qk_norm", True) else "none",
        router=RouterConfig(score="sigmoid", scales_input=True),
    )


def _read_rotates(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Read which layers have rotary embedding: `no_rope_layers`, which is 1 for those that have, or all but every
    `no_rope_layer_interval`-th."""
    given, every = fields.get("no_rope_layers"), read_count([fields], "no_rope_layer_interval", 4)
    if not given:
        return tuple((i + 1) % every != 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers or not set(given) <= {0, 1}:
        raise UnsupportedConfig(
            f"expected no_rope_layers to list 0 or 1 for {layers} layers; config.json has {shown(given)}"
        )
    return tuple(bool(rotates) for rotates in given[:layers])


def _read_chunks(fields: Fields, rotates: tuple[bool, ...]) -> tuple[int, ...]:
    """Read the tokens of each layer's chunks, 0 where it attends to all; by default layers with rotary embedding have
    chunks."""
    size = fields.get("attention_chunk_size", 8192)
    by_rule = ["chunked_attention" if rotated and size is not None else "full_attention" for rotated in rotates]
    kinds = by_rule if fields.get("layer_types") is None else fields["layer_types"]
    known = isinstance(kinds, list) and len(kinds) == len(rotates)
    if not known or not set(kinds) <= {"chunked_attention", "full_attention"}:
        raise UnsupportedConfig(
            f"expected layer_types to name chunked or full attention for {len(rotates)} layers; config.json has"
            f" {shown(kinds)}"
        )
    return tuple(as_count("attention_chunk_size", size) if kind == "chunked_attention" else 0 for kind in kinds)


def _read_query_scale(fields: Fields) -> QueryScale | None:
    """Read the temperature of layers without rotary embedding. Published files switch it on by a number."""
    tuned = fields.get("attn_temperature_tuning", True)
    if tuned is not None and not isinstance(tuned, bool | int):
        raise UnsupportedConfig(f"expected attn_temperature_tuning to be true or false; config.json has {shown(tuned)}")
    if not tuned:
        return None
    return QueryScale(read_number([fields], "attn_scale", 0.1), read_count([fields], "floor_scale", 8192))


def _read_sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Read which layers route to experts: `moe_layers`, or every `interleave_moe_layer_step`-th."""
    step, given = read_count([fields], "interleave_moe_layer_step", 1), fields.get("moe_layers")
    if given is None:
        return tuple((i + 1) % step == 0 for i in range(layers))
    if not isinstance(given, list) or any(type(i) is not int for i in given):
        raise UnsupportedConfig(f"expected moe_layers to be a list of integers; config.json has {shown(given)}")
    return tuple(i in set(given) for i in range(layers))


def _write_llama4(config: DecoderConfig) -> dict[str, Any]:
    scale = config.query_scale
    tuned = {} if scale is None else {"attn_scale": scale.scale, "floor_scale": int(scale.step)}
    return tuned | {
        "intermediate_size": config.moe_intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.num_experts,
        "moe_layers": [i for i, sparse in enumerate(config.sparse_layers) if sparse],
        "no_rope_layers": [int(rotates) for rotates in config.rope_layers],
        "attention_chunk_size": max(config.attention_chunks) or None,
        "layer_types": ["chunked_attention" if chunk else "full_attention" for chunk in config.attention_chunks],
        "attn_temperature_tuning": scale is not None,
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm == "unit",
    }


LLAMA4 = Family(
    "Llama4ForCausalLM",
    _read_llama4,
    _write_llama4,
    TensorNames(
        router="feed_forward.router.weight",
        gate="feed_forward.experts.{expert}.gate_proj.weight",
        up="feed_forward.experts.{expert}.up_proj.weight",
        down="feed_forward.experts.{expert}.down_proj.weight",
        shared="feed_forward.shared_expert.",
        dense="feed_forward.",
    ),
    FusedForm(in_first=True, published=True),
    neutral={"clip_qkv": (), "scoring_func": ("sigmoid",), "norm_topk_prob": (False,)}
    | dict.fromkeys(
        ("attention_chunk_size", "attn_temperature_tuning", "no_rope_layers", "no_rope_layer_interval"), HONOURED
    ),
)
