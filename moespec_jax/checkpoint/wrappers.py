"""Text models that are published inside a model of text and images: their part of `config.json` and of the tensors."""

from typing import NamedTuple

from moespec_jax.checkpoint.config_fields import Fields, section, shown
from moespec_jax.errors import UnsupportedConfig


class Wrapper(NamedTuple):
    """A model around a text model, whose settings are its `text_config`.

    Fields:
        text: model_type of the text model.
        architecture: class of the text model in transformers.
        prefix: prefix of the text model's tensors.
        others: prefixes of all other tensors, which are left out.
    """

    text: str
    architecture: str
    prefix: str
    others: tuple[str, ...]


WRAPPERS = {
    "llama4": Wrapper(
        "llama4_text", "Llama4ForCausalLM", "language_model.", ("vision_model.", "multi_modal_projector.")
    ),
}
# Fields beside `text_config` that hold for the text model too, where it has none of its own.
_SHARED = (
    *("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    *("quantization_config", "compression_config"),
)


def text_fields(fields: Fields) -> Fields:
    """Return the text model's fields of a `config.json`: its own, or those of the text model inside a `Wrapper`.

    Raises:
        UnsupportedConfig: a wrapper has no text model of its kind.
    """
    name = fields.get("model_type")
    wrapper = WRAPPERS.get(name) if isinstance(name, str) else None
    if wrapper is None:
        return fields
    text = {key: value for key, value in section(fields, "text_config").items() if value is not None}
    if not text or text.get("model_type", wrapper.text) != wrapper.text:
        found = shown(text.get("model_type") if text else fields.get("text_config"))
        raise UnsupportedConfig(f"expected text_config of {name} to describe a {wrapper.text}; config.json has {found}")
    shared = {key: fields[key] for key in _SHARED if fields.get(key) is not None}
    return shared | text | {"model_type": wrapper.text, "architectures": [wrapper.architecture]}


def text_name(model_type: str, name: str) -> str | None:
    """Return the name of a tensor in a text model that may be inside a wrapper; None where it is left out."""
    for wrapper in WRAPPERS.values():
        if wrapper.text == model_type:
            return None if name.startswith(wrapper.others) else name.removeprefix(wrapper.prefix)
    return name
