"""Collectives of a program that runs on every device of a mesh at once (`jax.shard_map`). Without axes, nothing."""

import jax
import numpy as np
from jaxtyping import Array

from moespec_jax.parallel.mesh import DATA, Axes


def total(x: Array, axes: Axes) -> Array:
    """The sum of what each device has."""
    return jax.lax.psum(x, axes) if axes else x


def average(x: Array, axes: Axes) -> Array:
    """The mean of what each device has."""
    return jax.lax.pmean(x, axes) if axes else x


def joined(x: Array, axes: Axes) -> Array:
    """Each device's part of the last dimension, side by side."""
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) if axes else x


def part_index(axes: Axes) -> Array | int:
    """The number of this device's part of what is split over these axes."""
    return jax.lax.axis_index(axes) if axes else 0


def over_data() -> Axes:
    """The axes that the sequences of a batch are split over, in the program that is being traced."""
    return (DATA,) if DATA in jax.sharding.get_abstract_mesh().manual_axes else ()


def first_row(batch: int) -> Array | int:
    """The number, in the whole batch, of the first of this device's `batch` sequences."""
    axes = over_data()
    return jax.lax.axis_index(axes) * batch if axes else 0


def largest(x: Array, axes: Axes) -> Array:
    """The largest of what each device has; of booleans, whether any is true."""
    if not axes:
        return x
    return jax.lax.pmax(x.astype(np.int32), axes) > 0 if x.dtype == bool else jax.lax.pmax(x, axes)
