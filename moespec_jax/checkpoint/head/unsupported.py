"""What a draft head's file may ask for that this library would compute wrongly, each refused by name.

Flags of NVIDIA's ModelOpt heads, multipliers of Granite's, latent attention of DeepSeek's, and heads that are not
EAGLE-3's at all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, shown
from moespec_jax.checkpoint.head.fields import look_up, read_count, read_flag, read_number
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.files import listing
from moespec_jax.nn.layers import ACTIVATIONS

Shapes = Mapping[str, tuple[int, ...]]

# The only value that is computed, where the name occurs at all.
_FLAGS = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "next_layer_regular": True,
    "use_mtp_layernorm": False,
    "use_sliding_window": False,
    "mlp_bias": False,
}
_MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
)
_LATENT = ("kv_a_proj", "q_a_proj", "kv_b_proj")


def refuse_other_heads(places: Sequence[Fields], shapes: Shapes) -> None:
    """Pass over a head that is computed as EAGLE-3's are.

    `places` are the parts of its config.json, `shapes` its tensors by canonical name.

    Raises:
        UnsupportedConfig: it is another kind of head, or a setting has a value that is not computed; by name.
    """
    _refuse_kinds(places, shapes)
    for name, computed in _FLAGS.items():
        if (value := read_flag(places, name)) is not None and value != computed:
            raise UnsupportedConfig(f"{name} {_json(value)} is not supported: a head is computed as with the opposite")
    if (steps := read_count(places, "parallel_draft_step")) is not None and steps > 1:
        raise UnsupportedConfig(f"parallel_draft_step {steps} is not supported: a head drafts one token a step")
    for name in _MULTIPLIERS:
        if (value := read_number(places, name, 1.0)) != 1.0:
            raise UnsupportedConfig(f"{name} {value:g} is not supported: nothing is multiplied in a head")
    kinds = look_up(places, "layer_types") or ()
    if "sliding_attention" in kinds:
        raise UnsupportedConfig("layer_types asks for sliding_attention; a head's attention has no window")
    if (quantization := look_up(places, "quantization_config")) is not None:
        raise UnsupportedConfig(
            f"quantization_config is not supported: expected plain weights; came {shown(quantization)}"
        )
    if (activation := look_up(places, "hidden_act")) is not None and activation not in ACTIVATIONS:
        raise UnsupportedConfig(
            f"expected hidden_act among {', '.join(ACTIVATIONS)}; config.json says {shown(activation)}"
        )


def _refuse_kinds(places: Sequence[Fields], shapes: Shapes) -> None:
    kind = look_up(places, "speculators_model_type")
    if kind not in (None, "eagle3"):
        raise UnsupportedConfig(f"expected speculators_model_type eagle3; config.json says {shown(kind)}")
    latent = [name for name in shapes if any(part in name for part in _LATENT)]
    if latent or look_up(places, "kv_lora_rank") is not None:
        named = listing(latent) or f"kv_lora_rank {shown(look_up(places, 'kv_lora_rank'))}"
        raise UnsupportedConfig(f"multi-head latent attention in a head is not supported ({named})")
    fc = shapes.get("fc.weight", ())
    if len(fc) == 2 and fc[1] == 2 * fc[0] and "midlayer.hidden_norm.weight" not in shapes:
        raise UnsupportedConfig(
            f"expected an EAGLE-3 head; fc.weight {list(fc)} without midlayer.hidden_norm.weight is that of an EAGLE-1"
            " or EAGLE-2 head, which is computed differently"
        )


def _json(value: Any) -> str:
    return str(value).lower()
