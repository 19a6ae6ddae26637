"""Collectives inside a program that runs on every device of a mesh (`jax.shard_map`), by their names in `jax.lax`.

`axes` are the mesh axes over which to communicate; without any, a collective returns its argument.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moespec_jax.parallel.mesh import DATA, Axes


def psum(x: Array, axes: Axes) -> Array:
    """All-reduce to the sum."""
    return jax.lax.psum(x, axes) if axes else x


def pmean(x: Array, axes: Axes) -> Array:
    """All-reduce to the mean."""
    return jax.lax.pmean(x, axes) if axes else x


def pmax(x: Array, axes: Axes) -> Array:
    """All-reduce to the maximum; for booleans, to the logical or."""
    if not axes:
        return x
    return jax.lax.pmax(x.astype(np.int32), axes) > 0 if x.dtype == bool else jax.lax.pmax(x, axes)


def all_gather(x: Array, axes: Axes) -> Array:
    """Concatenate the devices' shards along the last dimension."""
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) if axes else x


def all_argmax(x: Array, axes: Axes) -> tuple[Array, Array]:
    """Find the largest element of the last dimension, which is sharded over `axes`: its index in the whole dimension,
    int32, and its value. As in `jnp.argmax`, the lowest index among equals, and NaN is larger than any number.

    Devices exchange one element of each shard.
    """
    index = jnp.argmax(x, axis=-1, keepdims=True).astype(jnp.int32)
    value = jnp.take_along_axis(x, index, axis=-1)
    if axes:
        indices, values = all_gather(index + axis_index(axes) * x.shape[-1], axes), all_gather(value, axes)
        shard = jnp.argmax(values, axis=-1, keepdims=True)
        index, value = (jnp.take_along_axis(part, shard, axis=-1) for part in (indices, values))
    return index[..., 0], value[..., 0]


def own_shard(x: Array, axes: Axes, axis: int = -1) -> Array:
    """Slice this device's shard of a dimension, to be sharded over `axes`, of an array that every device has."""
    if not axes:
        return x
    size = x.shape[axis] // axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(x, axis_index(axes) * size, size, axis)


def axis_index(axes: Axes) -> Array | int:
    """Return the index of this device's shard of a dimension that is sharded over `axes`; 0 without axes."""
    return jax.lax.axis_index(axes) if axes else 0


def axis_size(axes: Axes) -> int:
    """Return the number of shards of a dimension that is sharded over `axes`; 1 without axes."""
    return jax.lax.axis_size(axes) if axes else 1


def data_axes() -> Axes:
    """Return the axes over which the batch is sharded in the program being traced."""
    return (DATA,) if DATA in jax.sharding.get_abstract_mesh().manual_axes else ()


def first_sequence(batch: int) -> Array | int:
    """Return the index, in the whole batch, of the first of this device's `batch` sequences."""
    axes = data_axes()
    return jax.lax.axis_index(axes) * batch if axes else 0
