"""The key/value cache: a fixed number of slots per sequence, filled from the left.

Slot p of a sequence holds the token at position p. Everything from `length` on is free, whatever finite
numbers lie there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moespec_jax.config import DecoderConfig


@struct.dataclass
class Cache:
    """Keys and values of all layers and the number of tokens each sequence has committed.

    `k`, `v` are one array `[layers, batch, kv_heads, slots, head]` where layers are scanned, a tuple of
    `[batch, kv_heads, slots, head]` where they are unrolled (a static slice of a stacked array is a copy on CPU).
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    length: Int[Array, " batch"]

    @property
    def slots(self) -> int:
        """Capacity per sequence in tokens."""
        return jax.tree.leaves(self.k)[0].shape[-2]


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike, *, stacked: bool) -> Cache:
    """A cache of `slots` tokens per sequence, all free."""
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)

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
    """Put each sequence's new rows at its own slot `start[b]`: in place where `store` is donated, never a scatter.

    With `layer`, `store` holds all layers and that one's rows are written.
    """
    rows = rows.swapaxes(1, 2).astype(store.dtype)
    zero = jnp.zeros((), jnp.int32)
    batch = rows.shape[0]

    def write(b: Array, store: Array) -> Array:
        place, block = (jnp.asarray(b, jnp.int32), zero, start[b], zero), jax.lax.dynamic_slice_in_dim(rows, b, 1)
        if layer is not None:
            place, block = (layer, *place), block[None]
        return jax.lax.dynamic_update_slice(store, block, place)

    store = _for_each_sequence(batch, write, store)
    return store if layer is None else in_rows(store)


def keep_rows(cache: Cache, start: Int[Array, " batch"], rows: Int[Array, "batch kept"], window: int) -> Cache:
    """Of the `window` rows from slot `start[b]` on, put rows `rows[b]`, counted from there, first and in that order.

    A product with a one-hot matrix over the window: taken by index along the slots, the TPU compiler copies the cache.
    """
    pick = jax.nn.one_hot(rows, window, dtype=jax.tree.leaves(cache.k)[0].dtype)

    def keep(store: Array) -> Array:
        lead = store.ndim - 4
        zero = jnp.zeros((), jnp.int32)

        def move(b: Array, store: Array) -> Array:
            place = (*(zero,) * lead, jnp.asarray(b, jnp.int32), zero, start[b], zero)
            size = (*store.shape[:lead], 1, store.shape[-3], window, store.shape[-1])
            old = jax.lax.dynamic_slice(store, place, size)
            new = jnp.einsum("pw,...wh->...ph", pick[b], old, precision=jax.lax.Precision.HIGHEST)
            return jax.lax.dynamic_update_slice(store, new, place)

        store = _for_each_sequence(rows.shape[0], move, store)
        return store if lead == 0 else in_rows(store)

    return Cache(jax.tree.map(keep, cache.k), jax.tree.map(keep, cache.v), cache.length)


def in_rows(store: Array) -> Array:
    """The same, held to be laid out row by row, as its caller's loop gets it; for use inside a loop.

    Left alone, the TPU compiler transposes the whole cache at either end of a loop that writes single rows. Where the
    compiler distributes the program over a mesh (`jax.set_mesh`, axes of type Auto) nothing is held: a constraint
    cannot be partitioned, and every chip would gather the whole cache to apply it.
    """
    if AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types:
        return store
    return with_layout_constraint(store, Layout(major_to_minor=tuple(range(store.ndim))))


def _for_each_sequence(batch: int, body: Callable[[Any, Array], Array], store: Array) -> Array:
    """Small batches are unrolled; the program of a large one must not grow with it."""
    if batch > 8:
        return jax.lax.fori_loop(0, batch, body, store)
    for b in range(batch):
        store = body(b, store)
    return store
