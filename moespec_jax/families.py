"""Model families as values: how a `config.json` is read, and where each parameter is found in a checkpoint.

A family adds two things and no code path: a reader that turns the published fields into a `DecoderConfig`, and the
names of its tensors. Every field that changes the numbers is honoured or refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moespec_jax.config import DecoderConfig, RopeConfig
from moespec_jax.layers import ACTIVATIONS

Fields = Mapping[str, Any]


class UnsupportedConfig(ValueError):
    """A `config.json` says something this library would compute wrongly."""


class TensorNames(NamedTuple):
    """The names of a sparse layer's tensors below `model.layers.{layer}.`; `{expert}` is filled in per expert."""

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"


class Family(NamedTuple):
    """One `model_type`: the reader of its config and the names of its expert tensors."""

    read: Callable[[Fields], DecoderConfig]
    names: TensorNames


def read_config(fields: Fields) -> DecoderConfig:
    """The decoder that a published `config.json` describes.

    Raises:
        UnsupportedConfig: the model type is unknown, a field is missing or out of range, or asks for something that
            is not implemented; the message names the field.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedConfig(f"expected a model_type among {known}; config.json says {model_type!r}")
    if fields.get("quantization_config") is not None:
        raise UnsupportedConfig(
            f"quantization_config is not supported: expected plain weights; it says {fields['quantization_config']!r}"
        )
    try:
        config = FAMILIES[model_type].read(fields)
    except KeyError as missing:
        raise UnsupportedConfig(f"config.json of {model_type} lacks the field {missing}") from None
    except UnsupportedConfig:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as wrong:
        raise UnsupportedConfig(f"config.json of {model_type} has a field of the wrong type: {wrong}") from None
    _check(config)
    return config


def _read_qwen3_moe(fields: Fields) -> DecoderConfig:
    layers = _count(fields, "num_hidden_layers")
    window = fields.get("sliding_window", 4096) if _flag(fields, "use_sliding_window") else None
    bias = _flag(fields, "attention_bias")
    return DecoderConfig(
        **_common(fields),
        intermediate_size=_count(fields, "intermediate_size"),
        moe_intermediate_size=_count(fields, "moe_intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=_sparse_layers(fields, layers),
        sliding_windows=_uniform_windows(fields, layers, window),
        norm_topk_prob=_flag(fields, "norm_topk_prob"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def _read_qwen2_moe(fields: Fields) -> DecoderConfig:
    layers = _count(fields, "num_hidden_layers")
    window = fields.get("sliding_window", 4096) if _flag(fields, "use_sliding_window") else None
    below = fields.get("max_window_layers", 28)
    # Published rule of this family where `layer_types` is absent: every other layer below max_window_layers slides.
    slides = [bool(window) and i % 2 == 0 and i < below for i in range(layers)]
    by_rule = tuple(int(window or 0) if s else 0 for s in slides)
    return DecoderConfig(
        **_common(fields),
        intermediate_size=_count(fields, "intermediate_size"),
        moe_intermediate_size=_count(fields, "moe_intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=_sparse_layers(fields, layers),
        sliding_windows=_windows(fields, layers, window) if fields.get("layer_types") else by_rule,
        norm_topk_prob=_flag(fields, "norm_topk_prob"),
        qkv_bias=_flag(fields, "qkv_bias", True),
        shared_expert_intermediate_size=_count(fields, "shared_expert_intermediate_size"),
    )


def _read_olmoe(fields: Fields) -> DecoderConfig:
    layers = _count(fields, "num_hidden_layers")
    bias = _flag(fields, "attention_bias")
    clip = fields.get("clip_qkv")
    return DecoderConfig(
        **_common(fields),
        intermediate_size=_count(fields, "intermediate_size"),
        moe_intermediate_size=_count(fields, "intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=(True,) * layers,
        sliding_windows=(0,) * layers,  # the published code has no window, whatever the file says
        norm_topk_prob=_flag(fields, "norm_topk_prob"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="flat",
        clip_qkv=None if clip is None else _number("clip_qkv", clip),
    )


def _read_mixtral(fields: Fields) -> DecoderConfig:
    layers = _count(fields, "num_hidden_layers")
    return DecoderConfig(
        **_common(fields, rope_theta=1_000_000.0),
        intermediate_size=_count(fields, "intermediate_size"),
        moe_intermediate_size=_count(fields, "intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=(True,) * layers,
        sliding_windows=_uniform_windows(fields, layers, fields.get("sliding_window")),
        norm_topk_prob=True,
    )


FAMILIES: dict[str, Family] = {
    "olmoe": Family(_read_olmoe, TensorNames()),
    "qwen2_moe": Family(_read_qwen2_moe, TensorNames()),
    "qwen3_moe": Family(_read_qwen3_moe, TensorNames()),
    "mixtral": Family(
        _read_mixtral,
        TensorNames(
            router="block_sparse_moe.gate.weight",
            gate="block_sparse_moe.experts.{expert}.w1.weight",
            up="block_sparse_moe.experts.{expert}.w3.weight",
            down="block_sparse_moe.experts.{expert}.w2.weight",
        ),
    ),
}


def _common(fields: Fields, rope_theta: float = 10_000.0) -> dict[str, Any]:
    heads, hidden = _count(fields, "num_attention_heads"), _count(fields, "hidden_size")
    kv_heads = fields.get("num_key_value_heads")
    head_dim = fields.get("head_dim")
    return dict(
        model_type=fields["model_type"],
        vocab_size=_count(fields, "vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=_count(fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else _count(fields, "num_key_value_heads"),
        head_dim=hidden // heads if head_dim is None else _count(fields, "head_dim"),
        num_experts_per_tok=_count(fields, "num_experts_per_tok"),
        max_position_embeddings=_count(fields, "max_position_embeddings"),
        rms_norm_eps=_number("rms_norm_eps", fields["rms_norm_eps"]),
        hidden_act=str(fields.get("hidden_act", "silu")),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        rope=read_rope(fields, rope_theta),
    )


# A config.json is somebody else's file: no size in it may make us allocate without bound.
_LARGEST_COUNT = 1 << 24
_LARGEST = {"num_hidden_layers": 1 << 11, "num_experts": 1 << 14, "num_local_experts": 1 << 14}
_MOST_EXPERTS_IN_ALL = 1 << 18


def _count(fields: Fields, name: str) -> int:
    value, largest = fields[name], _LARGEST.get(name, _LARGEST_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise UnsupportedConfig(f"expected {name} to be an integer from 1 to {largest}; config.json says {value!r}")
    return value


def _flag(fields: Fields, name: str, default: bool = False) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UnsupportedConfig(f"expected {name} to be true or false; config.json says {value!r}")
    return default if value is None else value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise UnsupportedConfig(f"expected {name} to be a positive number; config.json says {value!r}")
    return float(value)


def _experts(fields: Fields) -> int:
    """Mixtral says `num_local_experts`; recent transformers writes it for Qwen3-MoE as well."""
    return _count(fields, "num_experts" if fields.get("num_local_experts") is None else "num_local_experts")


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    dense, step = set(fields.get("mlp_only_layers") or ()), fields.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        raise UnsupportedConfig(f"expected decoder_sparse_step to be a positive integer; config.json says {step!r}")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _uniform_windows(fields: Fields, layers: int, window: int | None) -> tuple[int, ...]:
    """One window for all layers: families whose published code does not read `layer_types`."""
    windows = _windows({}, layers, window)
    if fields.get("layer_types") is not None and _windows(fields, layers, window) != windows:
        raise UnsupportedConfig(
            f"{fields['model_type']} has one sliding_window for all layers; layer_types says {fields['layer_types']!r}"
        )
    return windows


def _windows(fields: Fields, layers: int, window: int | None) -> tuple[int, ...]:
    kinds = fields.get("layer_types")
    if window:
        _count({"sliding_window": window}, "sliding_window")
    if kinds is None:
        return (int(window or 0),) * layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise UnsupportedConfig(
            f"expected layer_types to name full or sliding attention for {layers} layers; got {kinds!r}"
        )
    if "sliding_attention" in kinds and not window:
        raise UnsupportedConfig("layer_types asks for sliding_attention, but sliding_window is not set")
    return tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds)


def read_rope(fields: Fields, default_theta: float) -> RopeConfig:
    """Rotary settings from either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`.

    Raises:
        UnsupportedConfig: a scaling other than default, linear, dynamic, yarn or llama3, or partial rotary heads.
    """
    given = dict(fields.get("rope_scaling") or {}) | dict(fields.get("rope_parameters") or {})
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = _number("rope_theta", given.pop("rope_theta", None) or fields.get("rope_theta") or default_theta)
    if rope_type not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise UnsupportedConfig(
            f"expected rope_type default, linear, dynamic, yarn or llama3; config.json says {rope_type!r}"
        )
    for source in (given, fields):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedConfig("partial_rotary_factor other than 1 is not supported")
    given.pop("partial_rotary_factor", None)
    given = {name: value for name, value in given.items() if value is not None}
    known = {f for f in RopeConfig.__dataclass_fields__ if f not in ("rope_type", "rope_theta")}
    if rope_type == "default":
        given = {}
    if rope_type in ("yarn", "llama3") and (original := fields.get("original_max_position_embeddings")) is not None:
        given["original_max_position_embeddings"] = original  # as in transformers, this place has precedence
    if unknown := set(given) - known:
        raise UnsupportedConfig(f"unknown rope parameter {sorted(unknown)[0]!r} for rope_type {rope_type!r}")
    _flag(given, "truncate")
    for name, value in given.items():
        if name == "factor" or (name != "truncate" and value != 0):  # published files have mscale 0
            _number(name, value)
    if rope_type != "default" and "factor" not in given:
        raise UnsupportedConfig(f"rope_type {rope_type!r} needs the parameter 'factor'")
    return RopeConfig(rope_type=rope_type, rope_theta=theta, **given)


def _check(config: DecoderConfig) -> None:
    """Refuse what the published code would also refuse, or what we would compute wrongly."""
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedConfig(
            f"expected hidden_act among {', '.join(ACTIVATIONS)}; config.json says {config.hidden_act!r}"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise UnsupportedConfig(
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds num_experts {config.num_experts}"
        )
    if config.num_hidden_layers * config.num_experts > _MOST_EXPERTS_IN_ALL:
        raise UnsupportedConfig(
            f"num_hidden_layers {config.num_hidden_layers} of num_experts {config.num_experts} are more than"
            f" {_MOST_EXPERTS_IN_ALL} experts"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedConfig(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise UnsupportedConfig(f"expected an even head_dim; config.json says {config.head_dim}")
