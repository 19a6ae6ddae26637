"""Parameters under construction: tensors come one by one from a `Source` and go to their final place on the device, so
that the host never holds a second copy of the model."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from moespec_jax.checkpoint.parameters import (
    Place,
    build_decoder,
    is_quantized,
    leaf_dtype,
    leaf_shapes,
    place_of,
    scale_of,
)
from moespec_jax.checkpoint.placement import Placement, repeat_heads, with_repeated_heads
from moespec_jax.checkpoint.tensor_table import Path, Tensor, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import Quantization, quantize_rows
from moespec_jax.parallel.mesh import REPLICATED

# A part of an array: a slice of every dimension.
Index = tuple[slice, ...]


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
    quantization: Quantization | None = None,
) -> Decoder:
    """The parameters, every tensor converted to `dtype` and put where the back-end wants it: on a mesh, straight to the
    devices that hold it, and read only where this process has one of them. With a `quantization`, routed experts are
    kept in it, each quantized as it comes."""
    table = tensor_table(config)
    store = LeafStore(config, backend, dtype, placement, quantization)
    wanted = [name for name, tensor in table.items() if store.wants(tensor)]
    for name, array in counted(source.read(wanted), len(wanted), "loading", progress):
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
    """Takes tensors in any order and puts each into its leaf, or into every device's part of it.

    `config` is the checkpoint's. On a mesh the parameters are those of `with_repeated_heads`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        backend: Backend,
        dtype: DTypeLike,
        placement: Placement | None = None,
        quantization: Quantization | None = None,
    ):
        self._backend, self._dtype, self._placement = backend, dtype, placement
        self._quantization: Quantization | None = quantization
        self._plan = REPLICATED if placement is None else placement.plan
        self._config = config if placement is None else with_repeated_heads(config, placement)
        self._shapes = leaf_shapes(self._config, backend, quantization)
        self._parts = {path: self._devices(path, shape) for path, shape in self._shapes.items()}
        self._leaves: dict[tuple[Path, Any], jax.Array] = {}

    def wants(self, tensor: Tensor) -> bool:
        """Whether any device of this process holds a part of a tensor of the table."""
        place = self._place(tensor.path)
        return any(_row(place, index) is not None for index in self._parts[place.leaf].values())

    def put(self, tensor: Tensor, array: np.ndarray) -> None:
        """Convert one published tensor to its final dtype and orientation, in place.

        Raises:
            CheckpointError: it is to be quantized, and not finite.
        """
        if is_quantized(tensor.path, self._quantization):
            try:
                array, scale = quantize_rows(array)
            except ValueError as error:
                where = "/".join(map(str, tensor.path))
                raise CheckpointError(f"expected finite weights to quantize; of {where}, {error}") from None
            self._put(scale_of(tensor.path), scale[None, :], transpose=False)
        self._put(tensor.path, array, tensor.transpose)

    def _put(self, path: Path, array: np.ndarray, transpose: bool) -> None:
        place = self._place(path)
        dtype = leaf_dtype(path, self._dtype, self._quantization)
        if not transpose:
            array = repeat_heads(array, self._shapes[place.leaf][place.row is not None], self._config.head_dim)
        for device, index in self._parts[place.leaf].items():
            row = _row(place, index)
            if row is None:
                continue
            own = index if place.row is None else index[1:]
            value = _converted(array[own[::-1] if transpose else own], dtype, transpose, device)
            if place.row is not None:
                value = self._write_row(place.leaf, device, index, value, row)
            # Wait: the source's memory may be used again, and pending copies would hold many tensors at once.
            self._leaves[place.leaf, device] = value.block_until_ready()

    def finish(self) -> Decoder:
        """The parameters, once every tensor of the table has been put."""
        leaves = {path: self._leaf(path, shape) for path, shape in self._shapes.items()}
        return build_decoder(self._config, self._backend, leaves, self._plan)

    def _place(self, path: Path) -> Place:
        return place_of(self._config, self._backend, path, self._plan)

    def _devices(self, path: Path, shape: tuple[int, ...]) -> dict[Any, Index]:
        """This process's devices that hold a part of a leaf, and which; None is wherever JAX puts it."""
        if self._placement is None:
            return {None: tuple(slice(0, size) for size in shape)}
        held = self._placement.sharding(path, shape).addressable_devices_indices_map(shape)
        return {
            device: tuple(slice(*one.indices(size)[:2]) for one, size in zip(index or (), shape, strict=True))
            for device, index in held.items()
        }

    def _write_row(self, leaf: Path, device: Any, index: Index, value: jax.Array, row: int) -> jax.Array:
        stack = self._leaves.pop((leaf, device), None)
        if stack is None:
            stack = jnp.zeros(tuple(one.stop - one.start for one in index), value.dtype, device=device)
        return _put_row(stack, value, np.int32(row), jax.default_backend() == "cpu")

    def _leaf(self, path: Path, shape: tuple[int, ...]) -> jax.Array:
        parts = [self._leaves.pop((path, device)) for device in self._parts[path]]
        if self._placement is None:
            return parts[0]
        return jax.make_array_from_single_device_arrays(shape, self._placement.sharding(path, shape), parts)


def _row(place: Place, index: Index) -> int | None:
    """The row, in a device's part of the leaf, that a tensor goes to; None where the device does not hold it."""
    if place.row is None:
        return 0
    return place.row - index[0].start if index[0].start <= place.row < index[0].stop else None


def _converted(array: np.ndarray, dtype: Any, transpose: bool, device: Any) -> jax.Array:
    """The tensor on the device, in memory of its own."""
    if not array.flags.c_contiguous:
        array, transpose = array.T, not transpose
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if array.dtype == dtype and not transpose:
        value = jnp.array(array, copy=True)
        return value if device is None else jax.device_put(value, device)
    # On CPU, device_put takes host memory as it is; jnp.asarray would copy it.
    return _convert(jax.device_put(array, device), dtype, transpose)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(array: jax.Array, dtype: Any, transpose: bool) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put_row(leaf: jax.Array, value: jax.Array, row: jax.Array, on_cpu: bool) -> jax.Array:
    # XLA:CPU updates bfloat16 by way of float32, which rewrites the whole leaf for every row; integers it leaves alone.
    as_bits = on_cpu and leaf.dtype.itemsize == 2
    bits = jnp.uint16 if as_bits else leaf.dtype
    leaf_bits, value_bits = (jax.lax.bitcast_convert_type(a, bits) for a in (leaf, value))
    updated = jax.lax.dynamic_update_index_in_dim(leaf_bits, value_bits, row, 0)
    return jax.lax.bitcast_convert_type(updated, leaf.dtype)
