"""Construction of parameters: tensors are read one by one from a `Source` and moved to their final place on the device,
so that the host never holds a second copy of the model."""

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
    check_blocks,
    is_quantized,
    leaf_dtype,
    leaf_shapes,
    part_path,
    place_of,
)
from moespec_jax.checkpoint.placement import Placement, repeat_heads, with_repeated_heads
from moespec_jax.checkpoint.tensor_table import Path, Tensor, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.quantization import FORMS, Quantization
from moespec_jax.parallel.mesh import REPLICATED

# One slice for each dimension of an array.
Index = tuple[slice, ...]


class Source(NamedTuple):
    """Readable tensors of one model, by published name.

    Fields:
        dtypes: stored dtype of each tensor of the table.
        read: function that yields the named tensors in their published shape, in the order and memory layout that suit
            the storage. An array is valid until the next one is requested; its memory may be reused.
        table: tensor table of the model.
    """

    dtypes: Mapping[str, np.dtype]
    read: Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]
    table: Mapping[str, Tensor]


def load_source(
    source: Source,
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    placement: Placement | None = None,
    progress: bool = False,
    quantization: Quantization | None = None,
) -> Decoder:
    """Load parameters in the layout of a back-end, every tensor converted to `dtype`.

    On a mesh, each tensor is moved directly to the devices that hold it, and read only by processes that have one of
    them. With a `quantization`, routed experts are quantized as they are read.

    Raises:
        CheckpointError: the source is damaged, or a matrix to be quantized is not finite.
        RequestError: as `check_blocks`.
    """
    store = LeafStore(config, backend, dtype, source.table, placement, quantization)
    names = [name for name, tensor in source.table.items() if store.holds(tensor)]
    for name, array in with_progress(source.read(names), len(names), "loading", progress):
        store.put(source.table[name], array)
    return store.finish()


def with_progress(
    tensors: Iterator[tuple[str, np.ndarray]], total: int, verb: str, progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Show a progress bar over an iterator of tensors."""
    return iter(tqdm(tensors, total=total, desc=verb, unit="tensor", disable=None if progress else True, leave=False))


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Convert an array to another float dtype, rounding to nearest; NaN and infinities are preserved.

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


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """Copy `array` into `out` in strips of rows: numpy copies a whole transposed matrix with poor locality, ten times
    slower."""
    for start in range(0, out.shape[0], 64):
        out[start : start + 64] = array[start : start + 64]


class HostBuffer:
    """Host memory that is reused for each tensor. Separate allocations, freed between parameters that stay, would
    fragment the heap. Large tensors have their own allocation, which the system reclaims when it is freed."""

    _LARGEST, _ALIGNMENT = 128 << 20, 64

    def __init__(self) -> None:
        self._small = self._aligned(0)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return uninitialised memory, aligned so that XLA:CPU reads it in place; it is valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._LARGEST:
            return self._aligned(size).view(dtype).reshape(shape)
        if size > len(self._small):
            # Grown in powers of two, so that little is freed on the way.
            self._small = self._aligned(1 << (size - 1).bit_length())
        return self._small[:size].view(dtype).reshape(shape)

    def _aligned(self, size: int) -> np.ndarray:
        memory = np.empty(size + self._ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % self._ALIGNMENT
        return memory[start : start + size]


class LeafStore:
    """Leaves under construction: accepts tensors in any order and writes each into its leaf, or into each device's part
    of it.

    Args:
        config: the checkpoint's settings. On a mesh the parameters are those of `with_repeated_heads`.
        backend: determines the layout.
        dtype: of the parameters.
        table: tensor table of `config`.
        placement: sharding (default: all on one device).
        quantization: of routed experts.
    """

    def __init__(
        self,
        config: DecoderConfig,
        backend: Backend,
        dtype: DTypeLike,
        table: Mapping[str, Tensor],
        placement: Placement | None = None,
        quantization: Quantization | None = None,
    ):
        self._backend, self._dtype, self._placement = backend, dtype, placement
        self._quantization: Quantization | None = quantization
        self._plan = REPLICATED if placement is None else placement.plan
        check_blocks(config, quantization, placement)
        self._config = config if placement is None else with_repeated_heads(config, placement)
        own_table = table if self._config == config else tensor_table(self._config)
        self._shapes = leaf_shapes(self._config, backend, quantization, own_table)
        self._parts = {path: self._devices(path, shape) for path, shape in self._shapes.items()}
        self._leaves: dict[tuple[Path, Any], jax.Array] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Test whether any device of this process holds a part of a tensor of the table."""
        place = self._place(tensor.path)
        return any(_row(place, index) is not None for index in self._parts[place.leaf].values())

    def put(self, tensor: Tensor, array: np.ndarray) -> None:
        """Convert one published tensor to its final dtype and orientation, and write it to its place.

        Raises:
            CheckpointError: it is to be quantized, and not finite.
        """
        if self._quantization is None or not is_quantized(tensor.path):
            self._put(tensor.path, array, tensor.transpose)
            return
        form = FORMS[self._quantization]
        try:
            arrays = form.quantize(array)
        except ValueError as error:
            where = "/".join(map(str, tensor.path))
            raise CheckpointError(f"expected finite weights to quantize; of {where}, {error}") from None
        for part, one in zip(form.parts, arrays, strict=True):
            self._put(part_path(tensor.path, part), one, tensor.transpose)

    def _put(self, path: Path, array: np.ndarray, transpose: bool) -> None:
        place = self._place(path)
        dtype = leaf_dtype(self._config, path, self._dtype, self._quantization)
        if not transpose:
            array = repeat_heads(array, self._shapes[place.leaf][place.row is not None], self._config.head_dim)
        for device, index in self._parts[place.leaf].items():
            row = _row(place, index)
            if row is None:
                continue
            part = index if place.row is None else index[1:]
            value = _to_device(array[part[::-1] if transpose else part], dtype, transpose, device)
            if place.row is not None:
                value = self._write_row(place.leaf, device, index, value, row)
            # Wait: the source may reuse its memory, and pending copies would hold many tensors at once.
            self._leaves[place.leaf, device] = value.block_until_ready()

    def finish(self) -> Decoder:
        """Build the parameters, after every tensor of the table has been put."""
        leaves = {path: self._leaf(path, shape) for path, shape in self._shapes.items()}
        return build_decoder(self._config, self._backend, leaves, self._plan)

    def _place(self, path: Path) -> Place:
        return place_of(self._config, self._backend, path, self._plan)

    def _devices(self, path: Path, shape: tuple[int, ...]) -> dict[Any, Index]:
        """Map this process's devices that hold a part of a leaf to its index; the key None is JAX's default device."""
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
    """Return the tensor's row in a device's part of the leaf, 0 where the leaf is one tensor; None where the device has
    no part of it."""
    if place.row is None:
        return 0
    return place.row - index[0].start if index[0].start <= place.row < index[0].stop else None


def _to_device(array: np.ndarray, dtype: Any, transpose: bool, device: Any) -> jax.Array:
    """Copy a tensor to the device, into memory that it does not share, converted to `dtype` and transposed there."""
    if not array.flags.c_contiguous:
        array, transpose = array.T, not transpose
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if array.dtype == dtype and not transpose:
        value = jnp.array(array, copy=True)
        return value if device is None else jax.device_put(value, device)
    # On CPU, device_put uses host memory without a copy, unlike jnp.asarray.
    return _convert(jax.device_put(array, device), dtype, transpose)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(array: jax.Array, dtype: Any, transpose: bool) -> jax.Array:
    return (array.T if transpose else array).astype(dtype)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put_row(leaf: jax.Array, value: jax.Array, row: jax.Array, on_cpu: bool) -> jax.Array:
    # XLA:CPU converts bfloat16 to float32 for the update, which rewrites the whole leaf for every row; integers are
    # updated in place.
    as_bits = on_cpu and leaf.dtype.itemsize == 2
    bits = jnp.uint16 if as_bits else leaf.dtype
    leaf_bits, value_bits = (jax.lax.bitcast_convert_type(a, bits) for a in (leaf, value))
    updated = jax.lax.dynamic_update_index_in_dim(leaf_bits, value_bits, row, 0)
    return jax.lax.bitcast_convert_type(updated, leaf.dtype)
