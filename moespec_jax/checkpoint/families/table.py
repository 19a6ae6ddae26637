"""The table of families by `model_type`, and the reader that all of them share."""

from moespec_jax.checkpoint.config_fields import Fields, shown
from moespec_jax.checkpoint.families.ernie import ERNIE
from moespec_jax.checkpoint.families.family import Family
from moespec_jax.checkpoint.families.gpt_oss import GPT_OSS
from moespec_jax.checkpoint.families.granite import GRANITE, GRANITE_SHARED
from moespec_jax.checkpoint.families.hunyuan import HUNYUAN
from moespec_jax.checkpoint.families.llama4 import LLAMA4
from moespec_jax.checkpoint.families.mixed_attention import AFMOE, EXAONE_MOE, LAGUNA, MELLUM
from moespec_jax.checkpoint.families.mixtral import MIXTRAL
from moespec_jax.checkpoint.families.olmo import FLEX_OLMO, OLMOE
from moespec_jax.checkpoint.families.phimoe import PHIMOE
from moespec_jax.checkpoint.families.qwen import QWEN2_MOE, QWEN3_MOE
from moespec_jax.checkpoint.families.sigmoid import DOTS1, GLM4_MOE, HY_V3, MINIMAX_M2, SOLAR_OPEN
from moespec_jax.checkpoint.quantized.detect import read_format
from moespec_jax.checkpoint.unsupported import UNSUPPORTED_FAMILIES, check_neutral
from moespec_jax.checkpoint.wrappers import text_fields
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.nn.layers import ACTIVATIONS

FAMILIES: dict[str, Family] = {
    "olmoe": OLMOE,
    "flex_olmo": FLEX_OLMO,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "gpt_oss": GPT_OSS,
    "glm4_moe": GLM4_MOE,
    "dots1": DOTS1,
    "solar_open": SOLAR_OPEN,
    "minimax_m2": MINIMAX_M2,
    "hy_v3": HY_V3,
    "ernie4_5_moe": ERNIE,
    "hunyuan_v1_moe": HUNYUAN,
    "mellum": MELLUM,
    "exaone_moe": EXAONE_MOE,
    "afmoe": AFMOE,
    "laguna": LAGUNA,
    "llama4_text": LLAMA4,
    "phimoe": PHIMOE,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE_SHARED,
}
_MOST_EXPERTS_IN_ALL = 1 << 18


def read_config(fields: Fields) -> DecoderConfig:
    """Read the decoder that a published `config.json` describes; of a model of text and images, the text model.

    Raises:
        UnsupportedConfig: the model type is unknown, or a field is missing, out of range or requires something that is
            not implemented; the message names the field.
    """
    fields = text_fields(fields)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        reason = UNSUPPORTED_FAMILIES.get(model_type) if isinstance(model_type, str) else None
        why = f", a family with {reason}" if reason else ""
        raise UnsupportedConfig(f"expected a model_type among {known}; config.json has {shown(model_type)}{why}")
    read_format(fields)
    check_neutral(fields, FAMILIES[model_type].neutral)
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
    rotated = min(rope.rotary_dim(config.head_dim) for rope in (config.rope, config.sliding_rope or config.rope))
    if rotated % 2 or rotated < (4 if config.rope.rope_type == "dynamic" else 2):
        raise UnsupportedConfig(
            f"expected an even head_dim that rope_type {config.rope.rope_type!r} can rotate; config.json has"
            f" {config.head_dim}" + ("" if rotated == config.head_dim else f", of which {rotated} are rotated")
        )
