"""Model families as values: the reader of a family's `config.json`, and the names of its tensors.

A family adds no code path to the decoder: its reader converts the published fields into a `DecoderConfig`. Every field
that changes results is either supported or refused by name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from moespec_jax.checkpoint.config_fields import (
    Fields,
    as_count,
    as_number,
    read_count,
    read_flag,
    require,
    require_count,
    shown,
)
from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.checkpoint.unsupported import check_neutral
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.nn.layers import ACTIVATIONS


class TensorNames(NamedTuple):
    """Names of a sparse layer's tensors below `model.layers.{layer}.`; `{expert}` is replaced by the expert's index."""

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"


class Family(NamedTuple):
    """One `model_type`.

    Fields:
        read: reader of its config.json. `read_config` converts the errors that missing and mistyped fields raise.
        names: names of its expert tensors.
    """

    read: Callable[[Fields], DecoderConfig]
    names: TensorNames


def read_config(fields: Fields) -> DecoderConfig:
    """Read the decoder that a published `config.json` describes.

    Raises:
        UnsupportedConfig: the model type is unknown, or a field is missing, out of range or requires something that is
            not implemented; the message names the field.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedConfig(f"expected a model_type among {known}; config.json has {shown(model_type)}")
    if fields.get("quantization_config") is not None:
        found = shown(fields["quantization_config"])
        raise UnsupportedConfig(f"quantization_config is not supported: expected plain weights; got {found}")
    check_neutral(fields)
    try:
        config = FAMILIES[model_type].read(fields)
    except UnsupportedConfig:
        raise
    except KeyError as missing:
        raise UnsupportedConfig(f"config.json of {model_type} lacks the field {missing}") from None
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as wrong:
        raise UnsupportedConfig(f"config.json of {model_type} has a field of the wrong type: {wrong}") from None
    _check(config)
    return config


def _read_qwen3_moe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    window = _window(fields, 4096) if read_flag([fields], "use_sliding_window", False) else 0
    bias = read_flag([fields], "attention_bias", False)
    return DecoderConfig(
        **_common(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "moe_intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=_sparse_layers(fields, layers),
        sliding_windows=_uniform_windows(fields, layers, window),
        norm_topk_prob=read_flag([fields], "norm_topk_prob", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


def _read_qwen2_moe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    window = _window(fields, 4096) if read_flag([fields], "use_sliding_window", False) else 0
    below = fields.get("max_window_layers", 28)
    # This family's published rule without `layer_types`: every other layer below max_window_layers has the window.
    by_rule = tuple(window if window and i % 2 == 0 and i < below else 0 for i in range(layers))
    return DecoderConfig(
        **_common(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "moe_intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=_sparse_layers(fields, layers),
        sliding_windows=_windows(fields, layers, window) if fields.get("layer_types") else by_rule,
        norm_topk_prob=read_flag([fields], "norm_topk_prob", False),
        qkv_bias=read_flag([fields], "qkv_bias", True),
        shared_expert_intermediate_size=require_count([fields], "shared_expert_intermediate_size"),
    )


def _read_olmoe(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    bias = read_flag([fields], "attention_bias", False)
    clip = fields.get("clip_qkv")
    return DecoderConfig(
        **_common(fields),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=(True,) * layers,
        # The published code has no windows, regardless of sliding_window.
        sliding_windows=_uniform_windows(fields, layers, 0),
        norm_topk_prob=read_flag([fields], "norm_topk_prob", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="flat",
        clip_qkv=None if clip is None else as_number("clip_qkv", clip),
    )


def _read_mixtral(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    return DecoderConfig(
        **_common(fields, rope_theta=1_000_000.0),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=require_count([fields], "intermediate_size"),
        num_experts=_experts(fields),
        sparse_layers=(True,) * layers,
        sliding_windows=_uniform_windows(fields, layers, _window(fields, None)),
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
    heads, hidden = require_count([fields], "num_attention_heads"), require_count([fields], "hidden_size")
    return dict(
        model_type=fields["model_type"],
        vocab_size=require_count([fields], "vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=require_count([fields], "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=read_count([fields], "num_key_value_heads", heads),
        head_dim=read_count([fields], "head_dim", hidden // heads),
        num_experts_per_tok=require_count([fields], "num_experts_per_tok"),
        max_position_embeddings=require_count([fields], "max_position_embeddings"),
        rms_norm_eps=as_number("rms_norm_eps", require([fields], "rms_norm_eps")),
        hidden_act=str(fields.get("hidden_act", "silu")),
        tie_word_embeddings=read_flag([fields], "tie_word_embeddings", False),
        rope=read_rope(fields, rope_theta),
    )


_MOST_EXPERTS_IN_ALL = 1 << 18


def _experts(fields: Fields) -> int:
    """Read the number of experts: `num_local_experts` (Mixtral, and Qwen3-MoE in recent transformers), or
    `num_experts`."""
    return require_count([fields], "num_experts" if fields.get("num_local_experts") is None else "num_local_experts")


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        raise UnsupportedConfig(f"expected decoder_sparse_step to be a positive integer; config.json has {shown(step)}")
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise UnsupportedConfig(f"expected mlp_only_layers to be a list of integers; config.json has {shown(dense)}")
    dense = set(dense)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _window(fields: Fields, default: int | None) -> int:
    """Read the sliding window in tokens, 0 for none."""
    value = fields.get("sliding_window", default)
    return as_count("sliding_window", value) if value else 0


def _uniform_windows(fields: Fields, layers: int, window: int) -> tuple[int, ...]:
    """Return one window for all layers, for families whose published code does not read `layer_types`."""
    windows = _windows({}, layers, window)
    if fields.get("layer_types") is not None and _windows(fields, layers, window) != windows:
        raise UnsupportedConfig(
            f"expected one sliding_window for all layers of {fields['model_type']}; layer_types is"
            f" {shown(fields['layer_types'])}"
        )
    return windows


def _windows(fields: Fields, layers: int, window: int) -> tuple[int, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        return (window,) * layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise UnsupportedConfig(
            f"expected layer_types to name full or sliding attention for {layers} layers; got {shown(kinds)}"
        )
    if "sliding_attention" in kinds and not window:
        raise UnsupportedConfig("expected a sliding_window for sliding_attention in layer_types; it is not set")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _check(config: DecoderConfig) -> None:
    """Refuse configs that the published code refuses too, or that would be computed wrongly."""
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedConfig(
            f"expected hidden_act among {', '.join(ACTIVATIONS)}; config.json has {shown(config.hidden_act)}"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise UnsupportedConfig(
            f"expected num_experts_per_tok of at most num_experts {config.num_experts}; config.json has"
            f" num_experts_per_tok {config.num_experts_per_tok}"
        )
    if config.num_hidden_layers * config.num_experts > _MOST_EXPERTS_IN_ALL:
        raise UnsupportedConfig(
            f"expected at most {_MOST_EXPERTS_IN_ALL} experts in all; config.json has num_hidden_layers"
            f" {config.num_hidden_layers} of num_experts {config.num_experts}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedConfig(
            f"expected num_attention_heads to be a multiple of num_key_value_heads {config.num_key_value_heads};"
            f" config.json has num_attention_heads {config.num_attention_heads}"
        )
    if config.head_dim % 2 or config.head_dim < (4 if config.rope.rope_type == "dynamic" else 2):
        raise UnsupportedConfig(
            f"expected an even head_dim that rope_type {config.rope.rope_type!r} can rotate; config.json has"
            f" {config.head_dim}"
        )
