"""The key/value cache: a fixed number of slots per sequence, filled from the left.

Slot p of a sequence holds the token at position p. Everything from `length` on is free, whatever bytes lie there.
"""

import jax
import jax.numpy as jnp
from flax import struct
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
    store: Float[Array, "batch kv_heads slots head"],
    rows: Float[Array, "batch tokens kv_heads head"],
    start: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads slots head"]:
    """Put each sequence's new rows at its own slot `start[b]`: in place where `store` is donated, never a scatter."""
    rows = rows.swapaxes(1, 2).astype(store.dtype)
    for b in range(store.shape[0]):
        zero = jnp.zeros((), jnp.int32)
        store = jax.lax.dynamic_update_slice(store, rows[b : b + 1], (jnp.int32(b), zero, start[b], zero))
    return store
