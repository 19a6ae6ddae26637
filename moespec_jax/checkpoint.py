"""Safetensors in: every name, shape and dtype is checked before a byte of weights is read, then tensors stream one by
one into their final place on the device, so that the host never holds a second copy of the model."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from moespec_jax.backend import Backend
from moespec_jax.config import DecoderConfig
from moespec_jax.decoder import Decoder
from moespec_jax.families import UnsupportedConfig, read_config
from moespec_jax.parameters import build_decoder, leaf_shapes, place_of
from moespec_jax.tensors import Path as TreePath
from moespec_jax.tensors import Tensor, is_ignorable, tensor_table

# Gives the sharding of a leaf from its path and shape; None leaves the choice to JAX.
Placement = Callable[[TreePath, tuple[int, ...]], Any]

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint is not what it must be: what was expected, what came, and where."""


class Entry(NamedTuple):
    """One tensor as a shard's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"expected a file {path.name} in {path.parent}; there is none") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"expected JSON in {path}; {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object in {path}; it holds a {type(value).__name__}")
    return value


def load_config(directory: Path) -> DecoderConfig:
    """The decoder described by a checkpoint directory's `config.json`."""
    fields = read_json(directory / "config.json")
    try:
        return read_config(fields)
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({directory / 'config.json'})") from None


def load_parameters(
    directory: Path,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
) -> Decoder:
    """Parameters of a directory, whichever of safetensors and orbax it holds."""
    return load_safetensors(directory, config, backend, dtype, placement, progress)


def load_safetensors(
    directory: Path,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
) -> Decoder:
    """Parameters from one or many safetensors shards, with or without an index.

    Raises:
        CheckpointError: anything unknown, missing, doubly assigned, misshapen or of an unsupported dtype, all in one
            message; or a shard that is truncated or not safetensors.
    """
    entries = scan(directory)
    check(config, entries, directory)
    table = tensor_table(config)
    store = LeafStore(config, backend, dtype, placement)
    wanted = {name: entry for name, entry in entries.items() if name in table}
    with tqdm(total=len(wanted), desc="loading", unit="tensor", disable=not progress, leave=False) as bar:
        for name, array in read_tensors(wanted):
            store.put(table[name], array)
            bar.update()
    return store.finish()


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are."""
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"expected an object 'weight_map' of file names in {directory / INDEX}")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"expected plain file names in {directory / INDEX}; it names {name!r}")
            if not (directory / name).exists():
                raise CheckpointError(f"expected the shard {name} in {directory}, as {INDEX} says; there is none")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"expected *.safetensors or an orbax directory in {directory}; there is neither")
    return files


def scan(directory: Path) -> dict[str, Entry]:
    """All tensors of all shards by name, from the headers alone.

    Raises:
        CheckpointError: a name in two shards, or an unreadable shard.
    """
    entries: dict[str, Entry] = {}
    twice: list[str] = []
    for file in shard_files(directory):
        with _open(file) as shard:
            for name in shard.keys():
                part = shard.get_slice(name)
                if name in entries:
                    twice.append(f"{name} (in {entries[name].file.name} and {file.name})")
                entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    if twice:
        raise CheckpointError(f"doubly assigned: {_listing(twice)} in {directory}")
    return entries


def check(config: DecoderConfig, entries: Mapping[str, Entry], where: Path) -> None:
    """Compare headers with the tensor table, collecting every difference before raising."""
    table = tensor_table(config)
    unknown = [name for name in entries if name not in table and not is_ignorable(config, name)]
    missing = [name for name in table if name not in entries]
    both = [name for name in table if name in entries]
    misshapen = [
        f"{name} (expected {list(table[name].shape)}, came {list(entries[name].shape)})"
        for name in both
        if table[name].shape != entries[name].shape
    ]
    dtypes = [f"{name} ({entries[name].dtype})" for name in both if entries[name].dtype not in FLOATS]
    problems = {"unknown": unknown, "missing": missing, "misshapen": misshapen, "not F32, F16 or BF16": dtypes}
    found = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"tensors do not fit {config.model_type}: {'; '.join(found)} in {where}")


def read_tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, shard by shard. A shard is reopened after each `_REOPEN` bytes, because a mapped file's touched
    pages count as the process's memory until it is closed."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        position = 0
        while position < len(names):
            taken = 0
            with _open(file) as shard:
                while position < len(names) and taken < _REOPEN:
                    array = shard.get_tensor(names[position])
                    taken += array.nbytes
                    yield names[position], array
                    position += 1


_REOPEN = 64 << 20


class LeafStore:
    """Parameters under construction: takes tensors in any order, puts each into its leaf on the device."""

    def __init__(self, config: DecoderConfig, backend: Backend, dtype: DTypeLike, placement: Placement | None = None):
        self._config, self._backend, self._dtype = config, backend, jnp.dtype(dtype)
        self._placement = placement or (lambda path, shape: None)
        self._shapes = leaf_shapes(config, backend)
        self._leaves: dict[TreePath, jax.Array] = {}

    def put(self, tensor: Tensor, array: np.ndarray) -> None:
        """Convert one published tensor to its final dtype and orientation, in place."""
        place = place_of(self._config, self._backend, tensor.path)
        sharding = self._placement(place.leaf, self._shapes[place.leaf])
        if place.row is None:
            value = _convert(jnp.asarray(array), self._dtype, tensor.transpose)
            self._leaves[place.leaf] = value if sharding is None else jax.device_put(value, sharding)
            return
        if place.leaf not in self._leaves:
            self._leaves[place.leaf] = jnp.zeros(self._shapes[place.leaf], self._dtype, device=sharding)
        row = np.int32(place.row)
        self._leaves[place.leaf] = _put_row(self._leaves[place.leaf], jnp.asarray(array), row, tensor.transpose)
        # Wait, or the queue of pending copies would hold many tensors at once.
        self._leaves[place.leaf].block_until_ready()

    def finish(self) -> Decoder:
        """The parameters, once every tensor of the table has been put."""
        return build_decoder(self._config, self._backend, self._leaves)


def _convert_traced(array: jax.Array, dtype: Any, transpose: bool) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


_convert = jax.jit(_convert_traced, static_argnums=(1, 2))


def _put_row_traced(leaf: jax.Array, array: jax.Array, row: jax.Array, transpose: bool) -> jax.Array:
    value = _convert_traced(array, leaf.dtype, transpose)
    return jax.lax.dynamic_update_index_in_dim(leaf, value, row, 0)


_put_row = jax.jit(_put_row_traced, static_argnums=3, donate_argnums=0)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"expected a whole safetensors file at {file}; {error}") from None


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
