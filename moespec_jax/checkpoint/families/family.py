"""What a model family is: the reader and the writer of its `config.json`, and the names of its tensors.

A family adds no code path to the decoder: its reader converts the published fields into a `DecoderConfig`. Every field
that changes results is either supported or refused by name.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moespec_jax.checkpoint.config_fields import Fields
from moespec_jax.config import DecoderConfig


class TensorNames(NamedTuple):
    """Names of a sparse layer's tensors below `model.layers.{layer}.`; `{expert}` is replaced by the expert's index."""

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"


class Family(NamedTuple):
    """One `model_type`.

    Fields:
        architecture: its class in transformers.
        read: reader of its config.json. `read_config` converts the errors that missing and mistyped fields raise.
        write: the published fields of a config besides those that all families have.
        names: names of its expert tensors.
        neutral: fields that other families honour and this one does not have, with the values that change nothing.
    """

    architecture: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    names: TensorNames = TensorNames()
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
