"""Checkpoints in: every name, shape and dtype is checked before a byte of weights is read, then tensors stream one by
one into their final place."""

import json
from collections.abc import Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.leaves import HostBuffer, Source, load_source
from moespec_jax.checkpoint.orbax_io import is_orbax, open_orbax
from moespec_jax.checkpoint.placement import Placement
from moespec_jax.checkpoint.tensor_table import expert_matrices, is_ignorable, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.files import listing, read_json
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What tensors other than parameters may be: the vocabulary maps of a draft head.
STORED = FLOATS | {"I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


class Entry(NamedTuple):
    """One tensor as a shard's header describes it; `start` is its first byte in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


class Headers(NamedTuple):
    """What all shards' headers say together: each name's entry, and descriptions of names found twice."""

    entries: dict[str, Entry]
    twice: list[str]


def load_config(directory: Path) -> DecoderConfig:
    """The decoder described by a checkpoint directory's `config.json`."""
    return read_config_file(directory / "config.json")


def read_config_file(file: Path) -> DecoderConfig:
    """The decoder described by a `config.json`."""
    try:
        return read_config(read_json(file))
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({file})") from None


def read_architectures(directory: Path) -> list[str]:
    """What a checkpoint's `config.json` names as its `architectures`; empty where it names none."""
    named = read_json(directory / "config.json").get("architectures")
    return named if isinstance(named, list) else []


def load_parameters(
    directory: Path,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
    quantization: Quantization | None = None,
) -> Decoder:
    """Parameters of a directory, whichever of safetensors and orbax it holds.

    Raises:
        CheckpointError: as `open_source`; or a tensor turns out damaged while it is read.
    """
    source = open_source(directory, config)
    return load_source(source, config, backend, dtype, placement, progress, quantization)


def open_source(directory: Path, config: DecoderConfig) -> Source:
    """The tensors of a directory, whichever of safetensors and orbax it holds, checked against the tensor table."""
    return open_orbax(directory, config) if is_orbax(directory) else open_safetensors(directory, config)


def open_safetensors(directory: Path, config: DecoderConfig) -> Source:
    """The tensors of a directory of safetensors, checked by their headers.

    Raises:
        CheckpointError: no safetensors, a bad index, a shard that is missing, truncated or not safetensors; or tensors
            that are unknown, missing, misshapen, doubly assigned or of an unsupported dtype, all in one message.
    """
    headers = scan(directory)
    check(config, headers, directory)
    entries = {name: headers.entries[name] for name in tensor_table(config)}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_tensors({name: entries[name] for name in names})

    return Source({name: jnp.dtype(FLOATS[entry.dtype]) for name, entry in entries.items()}, read)


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, the one that holds everything, or all there are."""
    if not directory.is_dir():
        raise CheckpointError(f"expected a directory of safetensors or orbax; {directory} is none")
    if (directory / INDEX).exists():
        return [directory / name for name in _indexed_files(directory)]
    if (directory / WHOLE).exists():
        return [directory / WHOLE]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    others = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in sorted(directory.glob(pattern))]
    holds = f"it holds weights of another format ({listing(others)})" if others else "there is neither"
    raise CheckpointError(f"expected *.safetensors or an orbax directory in {directory}; {holds}")


def scan(directory: Path) -> Headers:
    """All tensors of all shards by name, from the headers alone.

    Raises:
        CheckpointError: a bad index, or a missing or unreadable shard.
    """
    found = Headers({}, [])
    for file in shard_files(directory):
        for name, entry in _read_header(file).items():
            if name in found.entries:
                found.twice.append(f"{name} (in {found.entries[name].file.name} and {file.name})")
            found.entries[name] = entry
    return found


def check(config: DecoderConfig, headers: Headers, where: Path) -> None:
    """Compare headers with the tensor table, collecting every difference before raising."""
    entries = headers.entries
    # The table of what a config.json claims is made only where there are about as many tensors.
    if (count := expert_matrices(config)) > 1000 + 2 * len(entries):
        raise CheckpointError(f"expected {count} matrices of experts; came {len(entries)} tensors in {where}")
    table = tensor_table(config)
    both = [name for name in table if name in entries]
    problems = {
        "unknown": [name for name in entries if name not in table and not is_ignorable(config, name)],
        "missing": [name for name in table if name not in entries],
        "misshapen": [
            f"{name} (expected {list(table[name].shape)}, came {list(entries[name].shape)})"
            for name in both
            if table[name].shape != entries[name].shape
        ],
        "doubly assigned": headers.twice,
        "not F32, F16 or BF16": [
            f"{name} ({entries[name].dtype})" for name in both if entries[name].dtype not in FLOATS
        ],
    }
    found = [f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"expected the tensors of {config.model_type}; came {'; '.join(found)} in {where}")


def read_tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, shard by shard, in the order of its bytes. Files are read and not mapped: a mapped file's touched
    pages count as the process's memory."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    buffer = HostBuffer()
    for file, names in by_file.items():
        try:
            with file.open("rb", buffering=0) as data:
                for name in sorted(names, key=lambda name: entries[name].start):
                    array = buffer.array(entries[name].shape, jnp.dtype(STORED[entries[name].dtype]))
                    data.seek(entries[name].start)
                    _fill(array, data)
                    yield name, array
        except OSError as error:
            raise CheckpointError(f"expected a readable safetensors file at {file}; {error.strerror}") from None


def _indexed_files(directory: Path) -> list[str]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"expected an object 'weight_map' of file names in {directory / INDEX}")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"expected *.safetensors beside {directory / INDEX}; it names {listing(outside)}")
    if missing := [name for name in names if not _exists(directory / name)]:
        raise CheckpointError(f"expected {listing(missing)} in {directory}, as {INDEX} says; there is no such shard")
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
            # Opened, its header is known to be whole and to fit the file.
            size = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(size))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"expected a whole safetensors file at {file}; {error}") from None
    header.pop("__metadata__", None)
    return {
        name: Entry(file, tuple(fields["shape"]), fields["dtype"], 8 + size + fields["data_offsets"][0])
        for name, fields in header.items()
    }


def _fill(array: np.ndarray, data: RawIOBase) -> None:
    """Read until the array is full; one call of the system reads no more than 2 GiB."""
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        count = data.readinto(rest)
        if not count:
            raise OSError(0, f"it ended {len(rest)} bytes early")
        rest = rest[count:]
