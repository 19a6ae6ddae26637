"""Draft heads in: a directory of EAGLE's, SpecForge's or speculators' format is checked whole before a byte of weights
is read, then tensors stream one by one to the device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.head.boundaries import Format
from moespec_jax.checkpoint.head.config import describe_head
from moespec_jax.checkpoint.head.tensor_table import O_BIAS, build_head, canonical_name, draft_table, is_ignorable
from moespec_jax.checkpoint.head.vocabulary import read_target_ids
from moespec_jax.checkpoint.leaves import cast
from moespec_jax.checkpoint.read import FLOATS, STORED, read_tensors, scan
from moespec_jax.checkpoint.tensor_table import Path as TreePath
from moespec_jax.checkpoint.tensor_table import Tensor
from moespec_jax.checkpoint.torch_archive import read_arrays, read_index
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.files import listing, read_json
from moespec_jax.nn.eagle3 import DraftHead

TORCH = "pytorch_model.bin"
_MAPS = ("d2t", "t2d")


class LoadedDraft(NamedTuple):
    """A draft head with its settings, lines to show whoever asked for it, and the format it came in."""

    config: DraftConfig
    head: DraftHead
    notes: tuple[str, ...]
    format: Format
    name: str = ""


class _Stored(NamedTuple):
    """The tensors of a directory by canonical name: shapes, dtypes (numpy's names), those found twice, and a reader
    whose arrays are good until the next."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    twice: list[str]
    read: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


def load_draft(
    directory: Path,
    target: DecoderConfig,
    dtype: DTypeLike | None,
    *,
    name: str = "",
    boundaries: tuple[int, ...] | None = None,
) -> LoadedDraft:
    """The draft head of a directory, to draft for `target`.

    All float parameters are converted to `dtype`, norms too, as the target's are; without one each keeps its own.
    `name` is what the head was asked for by, a hub id or a directory, for what is known of single repositories;
    `boundaries` overrides which states of the target are tapped.

    Raises:
        CheckpointError: as `describe_head` and `read_target_ids`; or tensors are unknown, missing, misshapen, doubly
            assigned or of an unsupported dtype; or a file is damaged.
    """
    fields = read_json(directory / "config.json")
    stored = _open(directory)
    described = describe_head(
        fields, stored.shapes, target, name=name or str(directory), boundaries=boundaries, where=str(directory)
    )
    config = described.config
    table = draft_table(config, o_bias=O_BIAS in stored.shapes)
    _check(table, stored, directory)
    maps = {key: array.copy() for key, array in stored.read([key for key in _MAPS if key in stored.shapes])}
    ids, notes = read_target_ids(
        maps.get("d2t"), maps.get("t2d"), config.vocab_size, config.draft_vocab_size, str(directory)
    )
    leaves: dict[TreePath, Any] = {("target_ids",): jnp.asarray(ids)}
    for key, array in stored.read(table):
        kept = array if dtype is None else cast(array, jnp.dtype(dtype), f"{key} of {directory}")
        leaves[table[key].path] = _on_device(kept, table[key].transpose)
    head, name = build_head(config, leaves), name or str(directory)
    return LoadedDraft(config, head, described.notes + notes, described.format, name)


def share_embedding(loaded: LoadedDraft, embedding: jax.Array) -> LoadedDraft:
    """The same head without an embedding of its own, if that is the target's `[vocab, model]` value for value.

    Some formats always write one; to keep it would be to hold the target's twice.
    """
    own = loaded.head.embed
    if own is None or own.shape != embedding.shape or own.dtype != embedding.dtype:
        return loaded
    if not bool(jnp.array_equal(jax.device_put(own, embedding.sharding), embedding)):
        return loaded
    config, head = loaded.config, loaded.head
    return loaded._replace(
        config=dataclasses.replace(config, own_embedding=False), head=dataclasses.replace(head, embed=None)
    )


def _open(directory: Path) -> _Stored:
    """The tensors of a directory: safetensors where there are any, else what `torch.save` wrote."""
    torch = directory / TORCH
    if torch.is_file() and not any(directory.glob("*.safetensors*")):
        return _open_archive(torch)
    headers = scan(directory)
    names, twice = _canonical(headers.entries)
    entries = {name: headers.entries[published] for name, published in names.items()}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_tensors({name: entries[name] for name in wanted})

    shapes = {name: entry.shape for name, entry in entries.items()}
    dtypes = {name: STORED.get(entry.dtype, entry.dtype) for name, entry in entries.items()}
    return _Stored(shapes, dtypes, headers.twice + twice, read)


def _open_archive(file: Path) -> _Stored:
    index = read_index(file)
    names, twice = _canonical(index)
    tensors = {name: index[published] for name, published in names.items()}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_arrays(file, tensors, wanted)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return _Stored(shapes, {name: str(tensor.dtype) for name, tensor in tensors.items()}, twice, read)


def _canonical(published: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Published names by canonical name, and descriptions of those that two published names share."""
    names: dict[str, str] = {}
    twice = []
    for name in published:
        if is_ignorable(name):
            continue
        canonical = canonical_name(name)
        if canonical in names:
            twice.append(f"{canonical} (as {names[canonical]} and {name})")
        names[canonical] = name
    return names, twice


def _check(table: dict[str, Tensor], stored: _Stored, where: Path) -> None:
    """Compare what is there with the table, collecting every difference before raising."""
    both = [name for name in table if name in stored.shapes]
    floats, integers = tuple(FLOATS.values()), ("int64", "int32", "uint8", "bool")
    problems = {
        "unknown": [name for name in stored.shapes if name not in table and name not in _MAPS],
        "missing": [name for name in table if name not in stored.shapes],
        "misshapen": [
            f"{name} (expected {list(table[name].shape)}, came {list(stored.shapes[name])})"
            for name in both
            if table[name].shape != stored.shapes[name]
        ],
        "doubly assigned": stored.twice,
        "of an unsupported dtype": [
            f"{name} ({dtype})"
            for name, dtype in stored.dtypes.items()
            if dtype not in (integers if name in _MAPS else floats)
        ],
    }
    found = [f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"expected the tensors of an EAGLE-3 head; came {'; '.join(found)} in {where}")


def _on_device(array: np.ndarray, transpose: bool) -> jax.Array:
    """The tensor on the device, in memory of its own: that of the array may be used again."""
    if transpose:
        return jnp.transpose(jax.device_put(array)).block_until_ready()
    return jnp.array(array, copy=True).block_until_ready()
