"""Reading of draft heads: EAGLE-3 in the formats of EAGLE, SpecForge and speculators, DFlash and DSpark in those of
z-lab, DeepSpec and speculators. A directory is checked before any weights
are read, then tensors are copied one by one to the device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.dtypes import CODES, FLOAT_DTYPES, INTEGER_DTYPES
from moespec_jax.checkpoint.head.boundaries import Format
from moespec_jax.checkpoint.head.config import describe_head
from moespec_jax.checkpoint.head.dflash_config import BlockFormat, describe_block_head, is_block_head
from moespec_jax.checkpoint.head.dflash_table import block_table, build_block_head, published_name
from moespec_jax.checkpoint.head.dflash_table import is_ignorable as is_ignorable_of_block
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
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead

TORCH = "pytorch_model.bin"
_MAPS = ("d2t", "t2d")
_BY_DRAFT_TOKEN = (LM_HEAD, "markov_head.markov_w2.weight")


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


class LoadedBlockDraft(NamedTuple):
    """A loaded DFlash or DSpark head; fields as those of `LoadedDraft`."""

    config: DFlashConfig
    head: DFlashHead
    notes: tuple[str, ...]
    format: BlockFormat
    name: str = ""

    def __repr__(self) -> str:
        return f"LoadedBlockDraft({self.name}, {self.format}, {self.head!r})"


AnyLoaded = TypeVar("AnyLoaded", bound=LoadedDraft | LoadedBlockDraft)


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
    stored = _open(directory, canonical_name, is_ignorable)
    name = name or str(directory)
    described = describe_head(fields, stored.shapes, target, name=name, boundaries=boundaries, where=str(directory))
    config = described.config
    table = draft_table(config, o_bias=O_BIAS in stored.shapes, lm_head=not described.shares_lm_head)
    _check(table, stored, directory, "the tensors of an EAGLE-3 head")
    leaves, notes = _read_leaves(table, stored, config, dtype, directory)
    return LoadedDraft(config, build_head(config, leaves), described.notes + notes, described.format, name)


def load_block_draft(
    directory: Path,
    target: DecoderConfig,
    dtype: DTypeLike | None,
    *,
    name: str = "",
    boundaries: tuple[int, ...] | None = None,
) -> LoadedBlockDraft:
    """Load the DFlash or DSpark head of a directory, as `load_draft` loads an EAGLE-3 head."""
    check_no_adapter(directory)
    fields = read_json(directory / "config.json")
    stored = _open(directory, published_name, is_ignorable_of_block)
    name = name or str(directory)
    described = describe_block_head(
        fields, stored.shapes, target, name=name, boundaries=boundaries, where=str(directory)
    )
    config = described.config
    table = block_table(config, lm_head=not described.shares_lm_head)
    _check(table, stored, directory, "the tensors of a DFlash head")
    leaves, notes = _read_leaves(table, stored, config, dtype, directory)
    return LoadedBlockDraft(config, build_block_head(config, leaves), described.notes + notes, described.format, name)


def load_any_draft(
    directory: Path,
    target: DecoderConfig,
    dtype: DTypeLike | None,
    *,
    name: str = "",
    boundaries: tuple[int, ...] | None = None,
) -> LoadedDraft | LoadedBlockDraft:
    """Load the head of a directory, of whichever kind its config.json is."""
    load = load_block_draft if is_block_head(read_json(directory / "config.json")) else load_draft
    return load(directory, target, dtype, name=name, boundaries=boundaries)


def share_embedding(loaded: AnyLoaded, embedding: jax.Array) -> AnyLoaded:
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


def share_lm_head(loaded: AnyLoaded, matrix: jax.Array) -> AnyLoaded:
    """Give the target's output matrix `[vocab, model]` to a head that has none; its memory is shared.

    A bias of the target's logits (Phi-3.5) is not shared: heads are trained with the matrix alone.
    """
    if loaded.head.lm_head is not None:
        return loaded
    return loaded._replace(head=dataclasses.replace(loaded.head, lm_head=matrix))


def _open(directory: Path, canonical: Callable[[str], str], is_ignorable: Callable[[str], bool]) -> _Stored:
    """Open the safetensors of a directory, or its `pytorch_model.bin` where there are none; `canonical` converts a
    published name, and `is_ignorable` tests a canonical one."""
    torch = directory / TORCH
    if torch.is_file() and not any(directory.glob("*.safetensors*")):
        return _open_archive(torch, canonical, is_ignorable)
    headers = read_headers(directory)
    published, duplicates = _canonical(headers.entries, canonical, is_ignorable)
    entries = {name: headers.entries[key] for name, key in published.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_tensors({name: entries[name] for name in names})

    shapes = {name: entry.shape for name, entry in entries.items()}
    dtypes = {name: CODES.get(entry.dtype, entry.dtype) for name, entry in entries.items()}
    return _Stored(shapes, dtypes, headers.duplicates + duplicates, read)


def _open_archive(file: Path, canonical: Callable[[str], str], is_ignorable: Callable[[str], bool]) -> _Stored:
    index = read_index(file)
    published, duplicates = _canonical(index, canonical, is_ignorable)
    tensors = {name: index[key] for name, key in published.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_arrays(file, tensors, names)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return _Stored(shapes, {name: str(tensor.dtype) for name, tensor in tensors.items()}, duplicates, read)


def _canonical(
    published: Iterable[str], canonical: Callable[[str], str], is_ignorable: Callable[[str], bool]
) -> tuple[dict[str, str], list[str]]:
    """Map canonical names to published ones; also describe canonical names that two published names share."""
    names: dict[str, str] = {}
    duplicates = []
    for name in published:
        own = canonical(name)
        if is_ignorable(own):
            continue
        if own in names:
            duplicates.append(f"{own} (as {names[own]} and {name})")
        names[own] = name
    return names, duplicates


def _check(table: dict[str, Tensor], stored: _Stored, where: Path, expected: str) -> None:
    """Compare stored tensors with the table, collecting all differences before raising; `expected` describes it."""
    problems = table_problems(table, stored.shapes, lambda name: name in _MAPS)
    problems["doubly assigned"] = stored.duplicates
    problems["of an unsupported dtype"] = [
        f"{name} ({dtype})"
        for name, dtype in stored.dtypes.items()
        if dtype not in (INTEGER_DTYPES if name in _MAPS else FLOAT_DTYPES)
    ]
    raise_problems(expected, problems, where)


def _read_leaves(
    table: dict[str, Tensor],
    stored: _Stored,
    config: DraftConfig | DFlashConfig,
    dtype: DTypeLike | None,
    where: Path,
) -> tuple[dict[TreePath, Any], tuple[str, ...]]:
    """Read the draft vocabulary and all tensors of the table to the device, by their paths; also warnings."""
    maps = {key: array.copy() for key, array in stored.read([key for key in _MAPS if key in stored.shapes])}
    ids, notes = read_target_ids(
        maps.get("d2t"), maps.get("t2d"), config.vocab_size, config.draft_vocab_size, str(where)
    )
    order = np.argsort(ids)
    moved = bool(np.any(ids != ids[order]))
    if LM_HEAD not in table and np.any(ids != np.arange(len(ids))):
        raise CheckpointError(f"expected {LM_HEAD} for tokens in the order of d2t; there is none in {where}")
    leaves: dict[TreePath, Any] = {("target_ids",): jax.device_put(ids[order])}
    for key, array in stored.read(table):
        if moved and key in _BY_DRAFT_TOKEN:
            array = array[order]  # rows by id, in whichever order they are stored
        converted = array if dtype is None else cast(array, jnp.dtype(dtype), f"{key} of {where}")
        leaves[table[key].path] = _to_device(converted, table[key].transpose)
    return leaves, notes


def _to_device(array: np.ndarray, transpose: bool) -> jax.Array:
    """Copy a tensor to the device, into memory that it does not share: that of the array may be reused."""
    if transpose:
        return jnp.transpose(jax.device_put(array)).block_until_ready()
    # A copy by NumPy, since one by JAX compiles a program for each shape.
    return jax.device_put(array.copy())
