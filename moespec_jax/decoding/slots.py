"""Slots of a batch of sequences, filled from the left."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def write_slots(
    slots: Shaped[Array, "batch slots *width"],
    rows: Shaped[Array, "batch path *width"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> Shaped[Array, "batch slots *width"]:
    """Write the first `count[b]` rows of each sequence from slot `start[b]` on."""
    # Which row each slot takes, if any: a scatter would be slower.
    index = jnp.arange(slots.shape[1], dtype=jnp.int32)[None, :] - start[:, None]
    written = (index >= 0) & (index < count[:, None])
    width = tuple(range(2, slots.ndim))
    taken = jnp.take_along_axis(rows, jnp.expand_dims(jnp.clip(index, 0, rows.shape[1] - 1), width), axis=1)
    return jnp.where(jnp.expand_dims(written, width), taken, slots)
