"""Routed experts of a layer that are fused into one tensor: each matrix as a part of it, and fused tensors to be
written where the family's published files have them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from moespec_jax.checkpoint.families import FAMILIES
from moespec_jax.checkpoint.families.family import FusedForm
from moespec_jax.checkpoint.leaves import Source, copy_into
from moespec_jax.checkpoint.shards import Entry, Part
from moespec_jax.checkpoint.tensor_table import Tensor
from moespec_jax.config import DecoderConfig


class Fused(NamedTuple):
    """One fused tensor.

    Fields:
        shape: its shape, `[experts, ...]`.
        block: shape of the part of one expert; a bias is a row.
        parts: expert, and part of its block, of each matrix by its name in the tensor table, in their order.
    """

    shape: tuple[int, ...]
    block: tuple[int, int]
    parts: dict[str, tuple[int, Part]]

    @property
    def blocks(self) -> int:
        """Number of blocks: that of experts, or one."""
        return 1 if self.shape == self.block else self.shape[0]


def fused_tensor(config: DecoderConfig, layer: str, name: str) -> Fused | None:
    """Describe the fused tensor `name` of a sparse block below `layer` (`model.layers.0.`); None where it is none."""
    family = FAMILIES[config.model_type]
    form, bias = family.fused, config.expert_bias and name.endswith("_bias")
    both, down = (family.names.gate, family.names.up), (family.names.down,)
    # Of any family, transformers may write the names of its memory.
    kinds = {FusedForm().gate_up: both, FusedForm().down: down, form.gate_up: both, form.down: down}
    kind = kinds.get(name.removesuffix("_bias") if bias else name)
    if kind is None:
        return None
    model, ffn = config.hidden_size, config.moe_intermediate_size
    out, inner = (model, ffn) if len(kind) == 1 else (ffn, model)
    width, in_first = len(kind) * out, bias or form.in_first
    block = (1, width) if bias else (inner, width) if in_first else (width, inner)
    parts = {}
    for expert in range(config.num_experts):
        for number, matrix in enumerate(kind):
            of_one = slice(number, None, len(kind)) if form.interleaved else slice(number * out, (number + 1) * out)
            place = (slice(None), of_one) if in_first else (of_one, slice(None))
            key = matrix.removesuffix("weight") + "bias" if bias else matrix
            parts[layer + key.format(expert=expert)] = expert, Part(block, place, in_first and not bias)
    return Fused((config.num_experts, width) if bias else (config.num_experts, *block), block, parts)


def fused_shared(config: DecoderConfig, layer: str, name: str) -> Fused | None:
    """Describe the tensor `name` of a shared expert below `layer`, where its gate and up are one; None where it is
    another."""
    family, model, ffn = FAMILIES[config.model_type], config.hidden_size, config.shared_expert_intermediate_size
    if not name or not ffn or name not in (family.fused.shared_gate_up, family.fused.shared_down):
        return None
    kinds, out, inner = (("gate", "up"), ffn, model) if name == family.fused.shared_gate_up else (("down",), model, ffn)
    block = (len(kinds) * out, inner)
    parts = {
        f"{layer}{family.names.shared}{kind}_proj.weight": (
            0,
            Part(block, (slice(i * out, (i + 1) * out), slice(None))),
        )
        for i, kind in enumerate(kinds)
    }
    return Fused(block, block, parts)


def entries_of(fused: Fused, entry: Entry) -> dict[str, Entry]:
    """Describe each matrix of a stored fused tensor as a tensor of its own."""
    size = entry.size // fused.blocks
    return {name: _entry(entry, part, entry.start + i * size, size) for name, (i, part) in fused.parts.items()}


def as_published(source: Source, config: DecoderConfig) -> Source:
    """Fuse the experts of a source whose family publishes them so; the source itself elsewhere. Reading such a tensor
    holds the experts of one layer."""
    form = FAMILIES[config.model_type].fused
    if not form.published:
        return source
    fused = dict(_fused_tensors(config))
    owner = {part: name for name, tensor in fused.items() for part in tensor.parts}
    table: dict[str, Tensor] = {}
    for name, tensor in source.table.items():
        group = owner.get(name)
        table[group or name] = tensor if group is None else Tensor(tensor.path, fused[group].shape)
    dtypes = {name: np.result_type(*_dtypes(source, fused, name)) for name in table}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            if name not in fused:
                yield from source.read([name])
                continue
            shape, block, parts = fused[name]
            whole = np.empty((fused[name].blocks, *block), dtypes[name])
            for member, array in source.read(parts):
                expert, part = parts[member]
                copy_into(whole[expert][part.place], array.T if part.transpose else array)
            yield name, whole.reshape(shape)

    return Source(dtypes, read, table)


def _fused_tensors(config: DecoderConfig) -> Iterator[tuple[str, Fused]]:
    """Yield every fused tensor of a model, with its name."""
    family = FAMILIES[config.model_type]
    block = family.names.sparse_block
    for i, sparse in enumerate(config.sparse_layers):
        for name in (family.fused.gate_up, family.fused.down):
            for suffix in ("", "_bias") if config.expert_bias else ("",):
                layer = f"model.layers.{i}."
                if sparse and (tensor := fused_tensor(config, layer, name + suffix)) is not None:
                    yield layer + block + name + suffix, tensor
        for name in (family.fused.shared_gate_up, family.fused.shared_down):
            layer = f"model.layers.{i}."
            if sparse and (tensor := fused_shared(config, layer, name)) is not None:
                yield layer + name, tensor


def _dtypes(source: Source, fused: dict[str, Fused], name: str) -> set[np.dtype]:
    return {source.dtypes[part] for part in fused[name].parts} if name in fused else {source.dtypes[name]}


def _entry(entry: Entry, part: Part, start: int, size: int) -> Entry:
    """Describe a part of the block that begins at byte `start`: where it is contiguous, as stored alone."""
    rows, columns = (range(*one.indices(length)) for one, length in zip(part.place, part.block, strict=True))
    shape = (len(rows), len(columns))
    if part.transpose or rows.step > 1 or shape[1] < part.block[1]:
        return entry._replace(shape=shape[::-1] if part.transpose else shape, start=start, size=size, part=part)
    row = size // part.block[0]
    return entry._replace(shape=shape, start=start + rows.start * row, size=len(rows) * row)
