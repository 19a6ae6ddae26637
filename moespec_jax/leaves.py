"""Parameters under construction: tensors come one by one from a `Source` and go to their final place on the device, so
that the host never holds a second copy of the model."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from tqdm import tqdm

from moespec_jax.backend import Backend
from moespec_jax.config import DecoderConfig
from moespec_jax.decoder import Decoder
from moespec_jax.files import CheckpointError
from moespec_jax.parameters import build_decoder, leaf_shapes, place_of
from moespec_jax.tensors import Path, Tensor, tensor_table

# Gives the sharding of a leaf from its path and shape; None leaves the choice to JAX.
Placement = Callable[[Path, tuple[int, ...]], Any]


class Source(NamedTuple):
    """All tensors of one model, readable by their published names.

    `dtypes` holds one entry for each tensor of the table; `read` yields the named tensors in their published shape, in
    whatever order and memory layout suits the storage. Each is good until the next is asked for, and no longer: its
    memory may be used again.
    """

    dtypes: Mapping[str, np.dtype]
    read: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


def load_source(
    source: Source,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
) -> Decoder:
    """The parameters, every tensor converted to `dtype` and put where the back-end wants it."""
    table = tensor_table(config)
    store = LeafStore(config, backend, dtype, placement)
    for name, array in counted(source.read(table), len(table), "loading", progress):
        store.put(table[name], array)
    return store.finish()


def counted(
    tensors: Iterator[tuple[str, np.ndarray]], total: int, verb: str, progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors under a progress bar."""
    return iter(tqdm(tensors, total=total, desc=verb, unit="tensor", disable=None if progress else True, leave=False))


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another float dtype, rounded to nearest; NaN and infinities stay what they are.

    Raises:
        CheckpointError: a finite value is too large for `dtype`.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if np.count_nonzero(np.isinf(out)) != np.count_nonzero(np.isinf(array)):
        raise CheckpointError(f"expected values that fit {dtype}; {name} ({array.dtype}) holds larger ones")
    return out


def copy_into(room: np.ndarray, array: np.ndarray) -> None:
    """`room[...] = array` in strips: numpy walks a whole transposed matrix against the cache, ten times slower."""
    for start in range(0, room.shape[0], 64):
        room[start : start + 64] = array[start : start + 64]


class HostBuffer:
    """Host memory that is used again for each tensor: memory of its own for each, freed between parameters that stay,
    would leave holes in the heap. Large tensors do get their own, which goes back to the system when they go."""

    _LARGEST, _ALIGNMENT = 32 << 20, 64

    def __init__(self) -> None:
        self._small = self._aligned(self._LARGEST)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialised memory, aligned so that XLA:CPU reads it in place."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._small[:size] if size <= self._LARGEST else self._aligned(size)
        return memory.view(dtype).reshape(shape)

    def _aligned(self, size: int) -> np.ndarray:
        memory = np.empty(size + self._ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % self._ALIGNMENT
        return memory[start : start + size]


class LeafStore:
    """Takes tensors in any order and puts each into its leaf on the device."""

    def __init__(self, config: DecoderConfig, backend: Backend, dtype: DTypeLike, placement: Placement | None = None):
        self._config, self._backend, self._dtype = config, backend, jnp.dtype(dtype)
        self._placement = placement or (lambda path, shape: None)
        self._shapes = leaf_shapes(config, backend)
        self._leaves: dict[Path, jax.Array] = {}

    def put(self, tensor: Tensor, array: np.ndarray) -> None:
        """Convert one published tensor to its final dtype and orientation, in place."""
        place = place_of(self._config, self._backend, tensor.path)
        sharding = _buildable(self._placement(place.leaf, self._shapes[place.leaf]))
        value = _converted(array, self._dtype, tensor.transpose)
        if place.row is None:
            leaf = value if sharding is None else jax.device_put(value, sharding)
        else:
            leaf = self._leaves.pop(place.leaf, None)
            if leaf is None:
                leaf = jnp.zeros(self._shapes[place.leaf], self._dtype, device=sharding)
            leaf = _row_writer(sharding)(leaf, value, np.int32(place.row), jax.default_backend() == "cpu")
        # Wait: the source's memory may be used again, and a queue of pending copies would hold many tensors at once.
        self._leaves[place.leaf] = leaf.block_until_ready()

    def finish(self) -> Decoder:
        """The parameters, once every tensor of the table has been put."""
        for path, shape in self._shapes.items():
            if (sharding := self._placement(path, shape)) is not None:
                self._leaves[path] = jax.device_put(self._leaves[path], sharding)
        return build_decoder(self._config, self._backend, self._leaves)


def _buildable(sharding: Any) -> Any:
    """The same sharding with the compiler free to place what lies between: a row and its leaf are sharded differently,
    which a mesh of explicit axes would not let pass."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)  # pyright: ignore[reportArgumentType]
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _converted(array: np.ndarray, dtype: Any, transpose: bool) -> jax.Array:
    """The tensor on the device, in memory of its own."""
    if not array.flags.c_contiguous:
        array, transpose = array.T, not transpose
    if array.dtype == dtype and not transpose:
        return jnp.array(array, copy=True)
    # On CPU, device_put takes host memory as it is; jnp.asarray would copy it.
    return _convert(jax.device_put(array), dtype, transpose)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(array: jax.Array, dtype: Any, transpose: bool) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


def _put_row(leaf: jax.Array, value: jax.Array, row: jax.Array, on_cpu: bool) -> jax.Array:
    # XLA:CPU updates bfloat16 by way of float32, which rewrites the whole leaf for every row; integers it leaves alone.
    as_bits = on_cpu and leaf.dtype.itemsize == 2
    bits = jnp.uint16 if as_bits else leaf.dtype
    leaf_bits, value_bits = (jax.lax.bitcast_convert_type(a, bits) for a in (leaf, value))
    updated = jax.lax.dynamic_update_index_in_dim(leaf_bits, value_bits, row, 0)
    return jax.lax.bitcast_convert_type(updated, leaf.dtype)


@functools.lru_cache
def _row_writer(sharding: Any) -> Callable[..., jax.Array]:
    # The sharding is pinned: a donated leaf can only be written in place if it stays where it is.
    return jax.jit(_put_row, static_argnums=3, donate_argnums=0, out_shardings=sharding)
