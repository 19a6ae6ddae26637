"""Reading of draft heads in the formats of EAGLE, SpecForge and speculators. A directory is checked before any weights
are read, then tensors are copied one by one to the device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.dtypes import CODES, FLOAT_DTYPES, INTEGER_DTYPES
from moespec_jax.checkpoint.head.boundaries import Format
from moespec_jax.checkpoint.head.config import describe_head
from moespec_jax.checkpoint.head.tensor_table import (
    LM_HEAD,
    O_BIAS,
    build_head,
    canonical_name,
    draft_table,
    is_ignorable,
)
from moespec_jax.checkpoint.head.vocabulary import read_target_ids
from moespec_jax.checkpoint.leaves import cast
from moespec_jax.checkpoint.read import check_no_adapter
from moespec_jax.checkpoint.shards import read_headers, read_tensors
from moespec_jax.checkpoint.tensor_table import Path as TreePath
from moespec_jax.checkpoint.tensor_table import Tensor, raise_problems, table_problems
from moespec_jax.checkpoint.torch_archive import read_arrays, read_index
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json
from moespec_jax.nn.eagle3 import DraftHead

TORCH = "pytorch_model.bin"
_MAPS = ("d2t", "t2d")


class LoadedDraft(NamedTuple):
    """A loaded draft head.

    Fields:
        config: settings.
        head: parameters.
        notes: lines to show the user (`HeadDescription.notes`).
        format: format of its files.
        name: hub id or directory.
    """

    config: DraftConfig
    head: DraftHead
    notes: tuple[str, ...]
    format: Format
    name: str = ""

    def __repr__(self) -> str:
        return f"LoadedDraft({self.name}, {self.format}, {self.head!r})"


class _Stored(NamedTuple):
    """Tensors of a directory by canonical name.

    Fields:
        shapes: published shapes.
        dtypes: stored dtypes, by numpy's names.
        duplicates: descriptions of names that occur more than once.
        read: function that yields the named tensors; an array is valid until the next one is requested.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    duplicates: list[str]
    read: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


def load_draft(
    directory: Path,
    target: DecoderConfig,
    dtype: DTypeLike | None,
    *,
    name: str = "",
    boundaries: tuple[int, ...] | None = None,
) -> LoadedDraft:
    """Load the draft head of a directory. Where it shares the target's output matrix, `share_lm_head` must follow.

    Args:
        directory: local directory.
        target: settings of the target.
        dtype: of all float parameters, norms included (default: each keeps its own).
        name: hub id or directory of the head, to find corrections for single repositories.
        boundaries: overrides those of the files.

    Raises:
        CheckpointError: as `check_no_adapter`, `describe_head` and `read_target_ids`; or tensors are unknown, missing,
            misshapen, doubly assigned or of an unsupported dtype; or a file is damaged.
    """
    check_no_adapter(directory)
    fields = read_json(directory / "config.json")
    stored = _open(directory)
    described = describe_head(
        fields, stored.shapes, target, name=name or str(directory), boundaries=boundaries, where=str(directory)
    )
    config = described.config
    table = draft_table(config, o_bias=O_BIAS in stored.shapes, lm_head=not described.shares_lm_head)
    _check(table, stored, directory)
    maps = {key: array.copy() for key, array in stored.read([key for key in _MAPS if key in stored.shapes])}
    ids, notes = read_target_ids(
        maps.get("d2t"), maps.get("t2d"), config.vocab_size, config.draft_vocab_size, str(directory)
    )
    if described.shares_lm_head and np.any(ids != np.arange(len(ids))):
        raise CheckpointError(f"expected {LM_HEAD} for tokens in the order of d2t; there is none in {directory}")
    order = np.argsort(ids)
    leaves: dict[TreePath, Any] = {("target_ids",): jax.device_put(ids[order])}
    for key, array in stored.read(table):
        if key == LM_HEAD and np.any(ids != ids[order]):
            array = array[order]  # rows by id, in whichever order they are stored
        converted = array if dtype is None else cast(array, jnp.dtype(dtype), f"{key} of {directory}")
        leaves[table[key].path] = _to_device(converted, table[key].transpose)
    head, name = build_head(config, leaves), name or str(directory)
    return LoadedDraft(config, head, described.notes + notes, described.format, name)


def share_embedding(loaded: LoadedDraft, embedding: jax.Array) -> LoadedDraft:
    """Remove a head's own embedding if it equals the target's `[vocab, model]`.

    Some formats always include one; keeping it would hold the target's embedding twice.
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


def share_lm_head(loaded: LoadedDraft, matrix: jax.Array) -> LoadedDraft:
    """Give the target's output matrix `[vocab, model]` to a head that has none; its memory is shared."""
    if loaded.head.lm_head is not None:
        return loaded
    return loaded._replace(head=dataclasses.replace(loaded.head, lm_head=matrix))


def _open(directory: Path) -> _Stored:
    """Open the safetensors of a directory, or its `pytorch_model.bin` where there are none."""
    torch = directory / TORCH
    if torch.is_file() and not any(directory.glob("*.safetensors*")):
        return _open_archive(torch)
    headers = read_headers(directory)
    published, duplicates = _canonical(headers.entries)
    entries = {name: headers.entries[key] for name, key in published.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_tensors({name: entries[name] for name in names})

    shapes = {name: entry.shape for name, entry in entries.items()}
    dtypes = {name: CODES.get(entry.dtype, entry.dtype) for name, entry in entries.items()}
    return _Stored(shapes, dtypes, headers.duplicates + duplicates, read)


def _open_archive(file: Path) -> _Stored:
    index = read_index(file)
    published, duplicates = _canonical(index)
    tensors = {name: index[key] for name, key in published.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_arrays(file, tensors, names)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return _Stored(shapes, {name: str(tensor.dtype) for name, tensor in tensors.items()}, duplicates, read)


def _canonical(published: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Map canonical names to published ones; also describe canonical names that two published names share."""
    names: dict[str, str] = {}
    duplicates = []
    for name in published:
        if is_ignorable(name):
            continue
        canonical = canonical_name(name)
        if canonical in names:
            duplicates.append(f"{canonical} (as {names[canonical]} and {name})")
        names[canonical] = name
    return names, duplicates


def _check(table: dict[str, Tensor], stored: _Stored, where: Path) -> None:
    """Compare stored tensors with the table, collecting all differences before raising."""
    problems = table_problems(table, stored.shapes, lambda name: name in _MAPS)
    problems["doubly assigned"] = stored.duplicates
    problems["of an unsupported dtype"] = [
        f"{name} ({dtype})"
        for name, dtype in stored.dtypes.items()
        if dtype not in (INTEGER_DTYPES if name in _MAPS else FLOAT_DTYPES)
    ]
    raise_problems("the tensors of an EAGLE-3 head", problems, where)


def _to_device(array: np.ndarray, transpose: bool) -> jax.Array:
    """Copy a tensor to the device, into memory that it does not share: that of the array may be reused."""
    if transpose:
        return jnp.transpose(jax.device_put(array)).block_until_ready()
    # A copy by NumPy, since one by JAX compiles a program for each shape.
    return jax.device_put(array.copy())
