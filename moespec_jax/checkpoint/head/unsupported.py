"""Settings of draft heads that this library would compute wrongly, each refused by name: flags of NVIDIA's ModelOpt,
multipliers of Granite, latent attention of DeepSeek, and heads of other kinds than EAGLE-3, DFlash and DSpark.
"""

from collections.abc import Mapping

from moespec_jax.checkpoint.config_fields import Places, look_up, read_count, read_flag, read_number, shown
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.files import listing
from moespec_jax.nn.layers import ACTIVATIONS

Shapes = Mapping[str, tuple[int, ...]]

# The supported value of each flag.
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
# Kinds of block drafters in files of speculators, and architectures in others.
BLOCK_KINDS = ("dflash", "dspark")
BLOCK_ARCHITECTURES = ("DFlashDraftModel", "Qwen3DSparkModel")
_OTHER_PARTS = ("qkv_proj", "g_proj", "aux_hidden_norms", "_conv.", "candidate_selector", "prefix_gru")
_LATENT = ("kv_a_proj", "q_a_proj", "kv_b_proj")


def check_supported(places: Places, shapes: Shapes) -> None:
    """Check that a head is computed as an EAGLE-3 head. `shapes` are those of its tensors, by canonical name.

    Raises:
        UnsupportedConfig: it is of another kind, or a setting has an unsupported value; the message names it.
    """
    _check_kind(places, shapes)
    for name, supported in _FLAGS.items():
        if read_flag(places, name, supported) != supported:
            value, needed = str(not supported).lower(), str(supported).lower()
            raise UnsupportedConfig(f"{name} {value} is not supported: expected {needed}")
    if (steps := read_count(places, "parallel_draft_step", 1)) > 1:
        raise UnsupportedConfig(f"parallel_draft_step {steps} is not supported: expected 1, one drafted token a step")
    _check_plain(places)
    kinds = look_up(places, "layer_types") or ()
    if "sliding_attention" in kinds:
        raise UnsupportedConfig(
            "sliding_attention in layer_types is not supported: expected attention without a window"
        )


def check_block_supported(places: Places, shapes: Shapes) -> None:
    """Check that a head is computed as a DFlash or DSpark head. `shapes` are those of its tensors, by published name.

    Raises:
        UnsupportedConfig: it is of another kind, or a setting has an unsupported value; the message names it.
    """
    kind, architectures = look_up(places, "speculators_model_type"), look_up(places, "architectures") or ()
    if kind not in (None, *BLOCK_KINDS):
        raise UnsupportedConfig(f"expected speculators_model_type dflash or dspark; config.json has {shown(kind)}")
    if kind is None and not set(architectures) & {*BLOCK_ARCHITECTURES}:
        raise UnsupportedConfig(
            f"expected architectures among {', '.join(BLOCK_ARCHITECTURES)}; config.json has {shown(architectures)}"
        )
    _check_plain(places)
    if read_flag(places, "mlp_bias", False):
        raise UnsupportedConfig("mlp_bias true is not supported: expected false")
    for name in ("conv_kernel_size", "selector_rank", "projector_type", "final_logit_softcapping"):
        if value := look_up(places, name):
            raise UnsupportedConfig(f"{name} {shown(value)} is not supported: expected a head without it")
    for name in ("output_multiplier", "input_embedding_scale"):
        if (value := read_number(places, name, 1.0)) != 1.0:
            raise UnsupportedConfig(f"{name} {value:g} is not supported: expected 1, a head without multipliers")
    if other := [name for name in shapes if any(part in name for part in (*_LATENT, *_OTHER_PARTS))]:
        raise UnsupportedConfig(f"expected the layers of a DFlash head; there are parts of others: {listing(other)}")


def _check_plain(places: Places) -> None:
    """Refuse multipliers, quantized weights and unknown activations."""
    for name in _MULTIPLIERS:
        if (value := read_number(places, name, 1.0)) != 1.0:
            raise UnsupportedConfig(f"{name} {value:g} is not supported: expected 1, a head without multipliers")
    if (quantization := look_up(places, "quantization_config")) is not None:
        raise UnsupportedConfig(
            f"quantization_config is not supported: expected plain weights; got {shown(quantization)}"
        )
    if (activation := look_up(places, "hidden_act")) is not None and activation not in ACTIVATIONS:
        raise UnsupportedConfig(
            f"expected hidden_act among {', '.join(ACTIVATIONS)}; config.json has {shown(activation)}"
        )


def _check_kind(places: Places, shapes: Shapes) -> None:
    """Refuse heads of other kinds than EAGLE-3."""
    kind = look_up(places, "speculators_model_type")
    if kind not in (None, "eagle3"):
        raise UnsupportedConfig(
            f"expected speculators_model_type eagle3, dflash or dspark; config.json has {shown(kind)}"
        )
    latent = [name for name in shapes if any(part in name for part in _LATENT)]
    if latent or look_up(places, "kv_lora_rank") is not None:
        found = listing(latent) or f"kv_lora_rank {shown(look_up(places, 'kv_lora_rank'))}"
        raise UnsupportedConfig(f"multi-head latent attention in a head is not supported ({found})")
    fc = shapes.get("fc.weight", ())
    if len(fc) == 2 and fc[1] == 2 * fc[0] and "midlayer.hidden_norm.weight" not in shapes:
        raise UnsupportedConfig(
            f"expected an EAGLE-3 head; fc.weight {list(fc)} without midlayer.hidden_norm.weight is that of an EAGLE-1"
            " or EAGLE-2 head, which is computed differently"
        )
