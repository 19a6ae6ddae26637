"""Safetensors files of a checkpoint directory: which of them count, their headers, and their tensors."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from moespec_jax.checkpoint.dtypes import CODES, COMPONENT_CODES
from moespec_jax.checkpoint.leaves import HostBuffer
from moespec_jax.checkpoint.quantized.scheme import BadComponent
from moespec_jax.errors import CheckpointError
from moespec_jax.files import listing, read_json

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_BLOCK = 1 << 22


class Part(NamedTuple):
    """Part of a stored matrix.

    Fields:
        block: shape of the matrix.
        place: rows and columns of the part.
        transpose: whether the part is to be transposed.
    """

    block: tuple[int, int]
    place: tuple[slice, slice]
    transpose: bool = False

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """Take the part."""
        return matrix[self.place].T if self.transpose else matrix[self.place]


class Entry(NamedTuple):
    """One tensor as the header of its shard describes it.

    Fields:
        file: shard.
        shape: published shape.
        dtype: code of safetensors.
        start: offset of its first byte in the file.
        size: number of its bytes.
        part: part of the stored matrix, where the tensor is not stored alone.
        components: of a quantized weight, its stored components by suffix of their names. The fields above are then
            those of the weight that they stand for, but for the place, which is that of its codes.
        combine: of a quantized weight, function that computes it from its components; it may raise `BadComponent`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int
    part: Part | None = None
    components: Mapping[str, "Entry"] = {}
    combine: Callable[[Mapping[str, np.ndarray], np.ndarray], None] | None = None


class Headers(NamedTuple):
    """Headers of all shards.

    Fields:
        entries: entry of each name.
        duplicates: descriptions of names that several shards have.
    """

    entries: dict[str, Entry]
    duplicates: list[str]


def shard_files(directory: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: the single file, those of its index, or all of the directory.

    Beside a single file, the index of other shards is that of an earlier checkpoint, which transformers leaves in place
    and does not read either.

    Raises:
        CheckpointError: there are none, the index is bad, or a file of the index is missing.
    """
    if not directory.is_dir():
        raise CheckpointError(f"expected a directory of safetensors or orbax; {directory} is none")
    indexed = _indexed_files(directory) if (directory / INDEX).exists() else []
    if (directory / SINGLE_FILE).exists() and SINGLE_FILE not in indexed:
        return [directory / SINGLE_FILE]
    if missing := [name for name in indexed if not _exists(directory / name)]:
        raise CheckpointError(f"expected {listing(missing)} in {directory}, listed in {INDEX}; there is no such shard")
    if indexed:
        return [directory / name for name in indexed]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    others = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in sorted(directory.glob(pattern))]
    holds = f"it holds weights of another format ({listing(others)})" if others else "there is neither"
    raise CheckpointError(f"expected *.safetensors or an orbax directory in {directory}; {holds}")


def read_headers(directory: Path) -> Headers:
    """Read the headers of all shards.

    Raises:
        CheckpointError: a bad index, or a missing or unreadable shard.
    """
    found = Headers({}, [])
    for file in shard_files(directory):
        for name, entry in _read_header(file).items():
            if name in found.entries:
                found.duplicates.append(f"{name} (in {found.entries[name].file.name} and {file.name})")
            found.entries[name] = entry
    return found


def read_tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor, shard by shard, in the order of its bytes; an array is valid until the next one is requested.
    Files are read, not mapped: touched pages of a mapped file count as memory of the process. A quantized weight is
    computed from its components as they are read.

    Raises:
        CheckpointError: a file cannot be read, or ends early, or a component has values that it cannot have.
    """
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    buffers: dict[int, HostBuffer] = defaultdict(HostBuffer)
    for file, names in by_file.items():
        try:
            with file.open("rb", buffering=0) as data:
                array, start = np.empty(0), -1
                for name in sorted(names, key=lambda name: entries[name].start):
                    entry = entries[name]
                    if entry.part is None or entry.start != start:  # parts of one matrix are read at once
                        array, start = _read(name, entry, data, buffers), entry.start
                    yield name, entry.part.of(array) if entry.part else array
        except OSError as error:
            where = error.filename or file
            raise CheckpointError(f"expected a readable safetensors file at {where}; {error.strerror}") from None


def is_same(one: Entry, other: Entry) -> bool:
    """Test whether two stored tensors are equal in shape, dtype and every bit.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (one.shape, one.dtype, one.components.keys()) != (other.shape, other.dtype, other.components.keys()):
        return False
    if one.components:
        return all(is_same(stored, other.components[suffix]) for suffix, stored in one.components.items())
    left = one.size
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            while left > 0:
                block = first.read(min(left, _BLOCK))
                if not block or block != second.read(len(block)):
                    return False
                left -= len(block)
    except OSError as error:
        raise CheckpointError(f"expected a readable safetensors file at {one.file}; {error.strerror}") from None
    return True


def _indexed_files(directory: Path) -> list[str]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"expected an object 'weight_map' of file names in {directory / INDEX}")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"expected *.safetensors beside {directory / INDEX}; it names {listing(outside)}")
    return names


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a name that is too long
        return False


def _read_header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise CheckpointError(f"expected a safetensors file at {file}; it is no file")
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as data:
            # Opening has checked that the header is whole and matches the file.
            size = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(size))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"expected a whole safetensors file at {file}; {error}") from None
    header.pop("__metadata__", None)
    return {
        name: Entry(file, tuple(fields["shape"]), fields["dtype"], 8 + size + start, end - start)
        for name, fields in header.items()
        for start, end in [fields["data_offsets"]]
    }


def _read(name: str, entry: Entry, data: RawIOBase, buffers: Mapping[int, HostBuffer]) -> np.ndarray:
    """Read a tensor, or the whole matrix that it is part of, from its open file, or compute it from its components.
    There is a buffer for each place of a component, and one for the result."""
    shape = entry.shape if entry.part is None else entry.part.block
    array = buffers[-1].array(shape, jnp.dtype(CODES[entry.dtype]))
    if entry.combine is None:
        _fill(array, data, entry.start)
        return array
    components: dict[str, np.ndarray] = {}
    for place, (suffix, stored) in enumerate(entry.components.items()):
        components[suffix] = buffers[place].array(stored.shape, jnp.dtype(COMPONENT_CODES[stored.dtype]))
        if stored.file == entry.file:
            _fill(components[suffix], data, stored.start)
        else:
            with stored.file.open("rb", buffering=0) as other:
                _fill(components[suffix], other, stored.start)
    try:
        entry.combine(components, array)
    except BadComponent as bad:
        # Fused experts have components that are named in full.
        where = bad.suffix if "." in bad.suffix else f"{name.removesuffix('weight')}{bad.suffix}"
        file = entry.components[bad.suffix].file
        raise CheckpointError(f"expected {bad.expected} in {where}; got {bad.got} in {file}") from None
    return array


def _fill(array: np.ndarray, data: RawIOBase, start: int) -> None:
    """Read from an offset until the array is full: one system call reads at most 2 GiB."""
    data.seek(start)
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        count = data.readinto(rest)
        if not count:
            raise OSError(0, f"it ended {len(rest)} bytes early")
        rest = rest[count:]
