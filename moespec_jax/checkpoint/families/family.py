"""A model family as a value: the reader and the writer of its `config.json`, and the names of its tensors.

A family adds no code path to the decoder: its reader converts the published fields into a `DecoderConfig`. Every field
that changes results is either supported or refused by name.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moespec_jax.checkpoint.config_fields import Fields
from moespec_jax.config import DecoderConfig


class _Everything(tuple[Any, ...]):
    """Contains every value."""

    def __contains__(self, value: object) -> bool:
        return True


# In `Family.neutral`: the family reads the field.
HONOURED: tuple[Any, ...] = _Everything()


class TensorNames(NamedTuple):
    """Names of a layer's tensors below `model.layers.{layer}.`; `{expert}` is replaced by the expert's index.

    Fields:
        router, gate, up, down: matrices.
        correction: correction of the router's scores.
        correction_row: whether it is stored as a row `[1, experts]`.
        shared: prefix of the shared expert's matrices.
        dense: prefix of a dense layer's matrices.
        attention: names of a layer's other tensors that differ from the usual ones, by these.
    """

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"
    correction: str = "mlp.gate.e_score_correction_bias"
    correction_row: bool = False
    shared: str = "mlp.shared_experts."
    dense: str = "mlp."
    attention: Mapping[str, str] = MappingProxyType({})

    @property
    def sparse_block(self) -> str:
        """Name of the sparse block, with a dot."""
        return self.gate.partition("experts.")[0]


class FusedForm(NamedTuple):
    """Layout of the experts of a layer that are fused into one tensor.

    Fields:
        in_first: whether matrices are stored `[in, out]`.
        interleaved: whether outputs of gate and up alternate; else those of gate are first.
        published: whether published files are fused; else they have a tensor for every matrix.
        gate_up: name of the tensor of gate and up, below the sparse block. That of biases ends in `_bias`.
        down: as `gate_up`.
        shared_gate_up, shared_down: names of the tensors of the shared expert, below the layer, where its gate and up
            are one tensor; empty where they are two.
    """

    in_first: bool = False
    interleaved: bool = False
    published: bool = False
    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    shared_gate_up: str = ""
    shared_down: str = ""


class Family(NamedTuple):
    """One `model_type`.

    Fields:
        architecture: its class in transformers.
        read: reader of its config.json. `read_config` converts the errors that missing and mistyped fields raise.
        write: the published fields of a config besides those that all families have.
        names: names of its expert tensors.
        fused: form of experts that are stored in one tensor.
        mtp: whether published files have layers after the last one, which predict further tokens (multi-token
            prediction); they are left out.
        neutral: fields that other families honour and this one does not have, with the values that change nothing.
    """

    architecture: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    names: TensorNames = TensorNames()
    fused: FusedForm = FusedForm()
    mtp: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
