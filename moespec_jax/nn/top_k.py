"""The k largest values of a long axis, in the order of `jax.lax.top_k`.

On NVIDIA GPUs, one row of `jax.lax.top_k` over a vocabulary occupies a small part of the device. Two stages occupy all
of it: the largest of each part of the axis, and then the largest of those.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.parallel.collectives import all_gather, axis_index, axis_size
from moespec_jax.parallel.mesh import Axes

PARTS = 64
# Shorter axes take one stage.
SHORTEST = 4096


def top_k(values: Float[Array, "*rows n"], k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Find the k largest values, descending, and their indices; lower indices first among equals."""
    if values.shape[-1] < max(SHORTEST, PARTS * k):
        return _one_stage(values, k=k)
    return jax.lax.platform_dependent(values, cuda=partial(two_stages, k=k), default=partial(_one_stage, k=k))


def most_probable(logits: Float[Array, "*rows n"], k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Find the k most probable tokens, best first, and their log-probabilities; lower ids first among equals."""
    return top_logarithms(jax.nn.log_softmax(logits, axis=-1), k)


def top_logarithms(
    log_probabilities: Float[Array, "*rows n"], k: int
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Compute `top_k` of logarithms of probabilities. One may round to above 0, or to -0, which `top_k` ranks below 0:
    both become 0, so that no child of a draft tree precedes its parent."""
    return top_k(jnp.where(log_probabilities < 0, log_probabilities, 0.0), k)


# `most_probable`, or a function of its signature.
MostProbable = Callable[[Array, int], tuple[Array, Array]]


def most_probable_of_shards(
    find: MostProbable, logits: Float[Array, "*rows shard"], k: int, axes: Axes
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Compute `most_probable` of a vocabulary that is sharded over `axes`, from the k that `find` finds in every shard.

    Devices exchange these and the sum of each shard's exponentials. Equal logits have equal log-probabilities, whose
    last digits depend on the number of shards.
    """
    if not axes:
        return find(logits, k)
    *rows, size = logits.shape
    _, ids = find(logits, min(k, size))
    values = jnp.take_along_axis(logits, ids, axis=-1)
    # Of a shard of -inf alone, -inf less -inf would be NaN.
    exponentials = jnp.where(logits > -jnp.inf, jnp.exp(logits - values[..., :1]), 0.0)
    found = jnp.concatenate([values, jnp.sum(exponentials, axis=-1, keepdims=True)], axis=-1)
    found = all_gather(found, axes).reshape(*rows, axis_size(axes), -1)
    ids, values, sums = all_gather(ids + axis_index(axes) * size, axes), found[..., :-1], found[..., -1]
    largest = jnp.max(values[..., 0], axis=-1, keepdims=True)
    total = jnp.sum(sums * jnp.exp(values[..., 0] - largest), axis=-1, keepdims=True)
    # Shards follow each other, and equals within one too: positions are in the order of ids among equals.
    best, place = top_logarithms((values.reshape(*rows, -1) - largest) - jnp.log(total), k)
    return best, jnp.take_along_axis(ids, place, axis=-1)


def two_stages(values: Float[Array, "*rows n"], *, k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Compute `top_k` from the k largest of each of `PARTS` parts of the axis; a part has at least k values."""
    *rows, n = values.shape
    width = -(-n // PARTS)
    # Padding has the highest indices of all, and so comes after a value of -inf.
    padded = jnp.pad(values, [(0, 0)] * len(rows) + [(0, PARTS * width - n)], constant_values=-jnp.inf)
    best, ids = jax.lax.top_k(padded.reshape(*rows, PARTS, width), k)
    ids = ids + width * jax.lax.broadcasted_iota(jnp.int32, ids.shape, len(rows))
    # Parts follow each other, and equals within a part too: positions are in the order of indices among equals.
    top, position = jax.lax.top_k(best.reshape(*rows, PARTS * k), k)
    return top, jnp.take_along_axis(ids.reshape(*rows, PARTS * k), position, axis=-1)


def _one_stage(values: Array, *, k: int) -> tuple[Array, Array]:
    top, ids = jax.lax.top_k(values, k)
    return top, ids
