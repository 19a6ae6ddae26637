"""Reading of checkpoints: every name, shape and dtype is checked before any weights are read, then tensors are read one
by one into their final place."""

import json
from collections.abc import Iterable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from moespec_jax.checkpoint.dtypes import CODES, FLOAT_CODES
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.leaves import HostBuffer, Source, load_source
from moespec_jax.checkpoint.orbax_io import is_orbax, open_orbax
from moespec_jax.checkpoint.placement import Placement
from moespec_jax.checkpoint.tensor_table import (
    Tensor,
    check_expert_count,
    is_ignorable,
    raise_problems,
    table_problems,
    tensor_table,
)
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.files import listing, read_json
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class Entry(NamedTuple):
    """One tensor as the header of its shard describes it.

    Fields:
        file: shard.
        shape: published shape.
        dtype: code of safetensors.
        start: offset of its first byte in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


class Headers(NamedTuple):
    """Headers of all shards.

    Fields:
        entries: entry of each name.
        duplicates: descriptions of names that several shards have.
    """

    entries: dict[str, Entry]
    duplicates: list[str]


def load_config(directory: Path) -> DecoderConfig:
    """Read the decoder's settings from the `config.json` of a directory.

    Raises:
        CheckpointError: as `read_config_file`.
    """
    return read_config_file(directory / "config.json")


def read_config_file(file: Path) -> DecoderConfig:
    """Read the decoder's settings from a `config.json`.

    Raises:
        CheckpointError: the file is not a JSON object, or `read_config` refuses it.
    """
    try:
        return read_config(read_json(file))
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({file})") from None


def read_architectures(directory: Path) -> list[str]:
    """Read `architectures` of a checkpoint's `config.json`; empty where it has none."""
    architectures = read_json(directory / "config.json").get("architectures")
    return architectures if isinstance(architectures, list) else []


def load_parameters(
    directory: Path,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
    quantization: Quantization | None = None,
) -> Decoder:
    """Load the parameters of a directory of safetensors or orbax.

    Raises:
        CheckpointError: as `open_source`, or a tensor is damaged.
    """
    source = open_source(directory, config)
    return load_source(source, config, backend, dtype, placement, progress, quantization)


def open_source(directory: Path, config: DecoderConfig) -> Source:
    """Open a directory of safetensors or orbax, checked against the tensor table.

    Raises:
        CheckpointError: as `open_safetensors` and `open_orbax`.
    """
    return open_orbax(directory, config) if is_orbax(directory) else open_safetensors(directory, config)


def open_safetensors(directory: Path, config: DecoderConfig) -> Source:
    """Open a directory of safetensors, checked by their headers.

    Raises:
        CheckpointError: no safetensors, a bad index, a shard that is missing, truncated or not safetensors; or tensors
            that are unknown, missing, misshapen, doubly assigned or of an unsupported dtype, all in one message.
    """
    headers = read_headers(directory)
    check_expert_count(config, len(headers.entries), directory)
    table = tensor_table(config)
    _check_headers(config, table, headers, directory)
    entries = {name: headers.entries[name] for name in table}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        return read_tensors({name: entries[name] for name in names})

    return Source({name: jnp.dtype(FLOAT_CODES[entry.dtype]) for name, entry in entries.items()}, read, table)


def shard_files(directory: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: those of its index, the single file, or all of the directory.

    Raises:
        CheckpointError: there are none, the index is bad, or a file of the index is missing.
    """
    if not directory.is_dir():
        raise CheckpointError(f"expected a directory of safetensors or orbax; {directory} is none")
    if (directory / INDEX).exists():
        return [directory / name for name in _indexed_files(directory)]
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
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
    Files are read, not mapped: touched pages of a mapped file count as memory of the process.

    Raises:
        CheckpointError: a file cannot be read, or ends early.
    """
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    buffer = HostBuffer()
    for file, names in by_file.items():
        try:
            with file.open("rb", buffering=0) as data:
                for name in sorted(names, key=lambda name: entries[name].start):
                    array = buffer.array(entries[name].shape, jnp.dtype(CODES[entries[name].dtype]))
                    data.seek(entries[name].start)
                    _fill(array, data)
                    yield name, array
        except OSError as error:
            raise CheckpointError(f"expected a readable safetensors file at {file}; {error.strerror}") from None


def _check_headers(config: DecoderConfig, table: Mapping[str, Tensor], headers: Headers, where: Path) -> None:
    """Compare headers with the tensor table, collecting all differences before raising."""
    shapes = {name: entry.shape for name, entry in headers.entries.items()}
    problems = table_problems(table, shapes, lambda name: is_ignorable(config, name))
    problems["doubly assigned"] = headers.duplicates
    problems["not F32, F16 or BF16"] = [
        f"{name} ({headers.entries[name].dtype})"
        for name in table
        if name in headers.entries and headers.entries[name].dtype not in FLOAT_CODES
    ]
    raise_problems(f"the tensors of {config.model_type}", problems, where)


def _indexed_files(directory: Path) -> list[str]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"expected an object 'weight_map' of file names in {directory / INDEX}")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"expected *.safetensors beside {directory / INDEX}; it names {listing(outside)}")
    if missing := [name for name in names if not _exists(directory / name)]:
        raise CheckpointError(f"expected {listing(missing)} in {directory}, listed in {INDEX}; there is no such shard")
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
        name: Entry(file, tuple(fields["shape"]), fields["dtype"], 8 + size + fields["data_offsets"][0])
        for name, fields in header.items()
    }


def _fill(array: np.ndarray, data: RawIOBase) -> None:
    """Read until the array is full: one system call reads at most 2 GiB."""
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        count = data.readinto(rest)
        if not count:
            raise OSError(0, f"it ended {len(rest)} bytes early")
        rest = rest[count:]
