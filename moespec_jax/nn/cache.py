"""The key/value cache: a fixed number of slots for each sequence, filled from the left.

Slot p of a sequence holds the token at position p. Slots from `length` on are free; they contain arbitrary finite
numbers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import axis_size
from moespec_jax.parallel.mesh import Axes


@struct.dataclass
class Cache:
    """Keys and values of all layers.

    Fields:
        k, v: one array with a leading axis over layers where layers are scanned; a tuple of one array for each layer
            where they are unrolled (on CPU a static slice of a stacked array is a copy).
        length: number of committed tokens of each sequence.
    """

    k: Float[Array, "layers batch kv_heads slots head"] | tuple[Float[Array, "batch kv_heads slots head"], ...]
    v: Float[Array, "layers batch kv_heads slots head"] | tuple[Float[Array, "batch kv_heads slots head"], ...]
    length: Int[Array, " batch"]

    __repr__ = summary

    @property
    def slots(self) -> int:
        """Capacity of a sequence in tokens."""
        return jax.tree.leaves(self.k)[0].shape[-2]


def empty_cache(
    config: DecoderConfig | DraftConfig | DFlashConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike,
    *,
    stacked: bool,
    heads: Axes = (),
) -> Cache:
    """Allocate a cache of `slots` tokens of a decoder or rows of a draft head for each sequence, all free; inside a
    program that runs on every device of a mesh, a device's shard of it, whose heads are sharded over the axes
    `heads`."""
    shape = (batch, config.num_key_value_heads // axis_size(heads), slots, config.head_dim)

    def zeros() -> Array | tuple[Array, ...]:
        if stacked:
            return jnp.zeros((config.num_hidden_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def write_rows(
    store: Float[Array, "*layers batch kv_heads slots head"],
    rows: Float[Array, "batch tokens kv_heads head"],
    start: Int[Array, " batch"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*layers batch kv_heads slots head"]:
    """Write each sequence's new rows from slot `start[b]` on, in place where `store` is donated, without a scatter.

    With `layer`, `store` has a leading axis over layers, of which that one is written.
    """
    rows = rows.swapaxes(1, 2).astype(store.dtype)
    zero = jnp.zeros((), jnp.int32)
    batch = rows.shape[0]

    def write(b: int | Array, store: Array) -> Array:
        corner, block = (jnp.asarray(b, jnp.int32), zero, start[b], zero), jax.lax.dynamic_slice_in_dim(rows, b, 1)
        if layer is not None:
            corner, block = (layer, *corner), block[None]
        return jax.lax.dynamic_update_slice(store, block, corner)

    store = _for_each_sequence(batch, write, store)
    return store if layer is None else row_major(store)


def keep_rows(cache: Cache, start: Int[Array, " batch"], rows: Int[Array, "batch kept"], window: int) -> Cache:
    """Move rows `rows[b]` of the `window` rows from slot `start[b]` on to the first of these slots, in that order.

    Computed as a product with a one-hot matrix over the window: for a gather along the slots, the TPU compiler copies
    the cache.
    """
    selection = jax.nn.one_hot(rows, window, dtype=jax.tree.leaves(cache.k)[0].dtype)

    def keep(store: Array) -> Array:
        lead = store.ndim - 4
        zero = jnp.zeros((), jnp.int32)

        def move(b: int | Array, store: Array) -> Array:
            corner = (*(zero,) * lead, jnp.asarray(b, jnp.int32), zero, start[b], zero)
            size = (*store.shape[:lead], 1, store.shape[-3], window, store.shape[-1])
            old = jax.lax.dynamic_slice(store, corner, size)
            new = jnp.einsum("pw,...wh->...ph", selection[b], old, precision=jax.lax.Precision.HIGHEST)
            return jax.lax.dynamic_update_slice(store, new, corner)

        store = _for_each_sequence(rows.shape[0], move, store)
        return store if lead == 0 else row_major(store)

    return Cache(jax.tree.map(keep, cache.k), jax.tree.map(keep, cache.v), cache.length)


# `keep_rows`, or a function of its signature.
KeepRows = Callable[[Cache, Array, Array, int], Cache]


def row_major_cache(cache: Cache) -> Cache:
    """Constrain keys and values of all layers by `row_major`."""
    return dataclasses.replace(cache, k=jax.tree.map(row_major, cache.k), v=jax.tree.map(row_major, cache.v))


def row_major(store: Array) -> Array:
    """Constrain `store` to row-major layout, that of the caller's operand; for use inside a loop.

    Without the constraint, the TPU compiler transposes the whole cache before and after a loop that writes single
    rows. Where the compiler partitions the program over a mesh (`jax.set_mesh`, axes of type Auto) there is no
    constraint: it cannot be partitioned, and every device would gather the whole cache to apply it.
    """
    if AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types:
        return store
    return with_layout_constraint(store, Layout(major_to_minor=tuple(range(store.ndim))))


def _for_each_sequence(batch: int, body: Callable[[int | Array, Array], Array], store: Array) -> Array:
    """Apply `body` to every sequence in turn: unrolled for small batches, in a loop for large ones, whose program must
    not grow with the batch."""
    if batch > 8:
        return jax.lax.fori_loop(0, batch, body, store)
    for b in range(batch):
        store = body(b, store)
    return store
