"""The most probable tokens of a vocabulary and their log-probabilities by two Triton kernels.

In plain operations these are four reductions for the softmax, a selection, and two sorts, and the logits are read five
times. The first kernel finds sum and k largest of each part of the vocabulary, the second those of all parts.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from moespec_jax.nn.top_k import most_probable

# Tokens of a part, in the registers of one warp.
WIDTH = 1024
# More children, or larger vocabularies, take plain operations.
MOST_CANDIDATES = 8192


def most_probable_gpu(logits: Float[Array, "*rows n"], k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Compute `most_probable`: on NVIDIA GPUs with the kernels, elsewhere with plain operations."""
    *rows, n = logits.shape

    def fused(logits: Array) -> tuple[Array, Array]:
        best, ids = fused_most_probable(logits.reshape(-1, n), k)
        return best.reshape(*rows, k), ids.reshape(*rows, k)

    if -(-n // WIDTH) * k > MOST_CANDIDATES or k > min(n, WIDTH):
        return most_probable(logits, k)
    return jax.lax.platform_dependent(logits, cuda=fused, default=lambda logits: most_probable(logits, k))


def fused_most_probable(
    logits: Float[Array, "rows n"], k: int, *, interpret: bool = False
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """Compute `most_probable` with the kernels. Log-probabilities that rounding alone makes equal are in the order of
    their logits where they are of one part."""
    rows, n = logits.shape
    parts = -(-n // WIDTH)

    def of_part(logits, best, ids, peaks, sums):
        row, part = pl.program_id(0), pl.program_id(1)
        token = part * WIDTH + jnp.arange(WIDTH, dtype=jnp.int32)
        values = plgpu.load(logits.at[row, token], mask=token < n, other=-jnp.inf)
        peak = jnp.max(values, axis=0)
        peaks[row, part] = peak
        # Of a part without any, -inf less -inf would be NaN.
        sums[row, part] = jnp.sum(jnp.where(values > -jnp.inf, jnp.exp(values - peak), 0.0), axis=0)
        found, chosen, nth = _take(values, token, n, k)
        plgpu.store(best.at[row, part, nth], found, mask=nth < k)
        plgpu.store(ids.at[row, part, nth], chosen, mask=nth < k)

    def of_all(candidates, tokens, peaks, sums, best, ids):
        row = pl.program_id(0)
        part, nth = (jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32) for size in (parts, parts * k))
        peak = plgpu.load(peaks.at[row, part], mask=part < parts, other=-jnp.inf)
        largest = jnp.max(peak, axis=0)
        total = jnp.sum(plgpu.load(sums.at[row, part], mask=part < parts, other=0.0) * jnp.exp(peak - largest), axis=0)
        values = plgpu.load(candidates.at[row, nth], mask=nth < parts * k, other=-jnp.inf)
        token = plgpu.load(tokens.at[row, nth], mask=nth < parts * k, other=n)
        scores = (values - largest) - jnp.log(total)
        found, chosen, nth = _take(jnp.where(scores < 0, scores, 0.0), token, n, k)
        plgpu.store(best.at[row, nth], found, mask=nth < k)
        plgpu.store(ids.at[row, nth], chosen, mask=nth < k)

    def shapes(*sizes: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return jax.ShapeDtypeStruct(sizes, jnp.float32), jax.ShapeDtypeStruct(sizes, jnp.int32)

    best, ids, peaks, sums = pl.pallas_call(
        of_part,
        grid=(rows, parts),
        out_shape=(*shapes(rows, parts, k), *shapes(rows, parts)[:1] * 2),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="top_k_parts",
    )(logits)
    return pl.pallas_call(
        of_all,
        grid=(rows,),
        out_shape=shapes(rows, k),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="top_k",
    )(best.reshape(rows, parts * k), ids.reshape(rows, parts * k), peaks, sums)


def _take(values: Array, ids: Array, n: int, k: int) -> tuple[Array, Array, Array]:
    """Find the k largest values, descending, and their ids, the lower one first among equals, padded to a power of two;
    and their numbers. Ids from n on are none; NaN counts as -inf."""
    most = pl.next_power_of_2(k)
    nth = jnp.arange(most, dtype=jnp.int32)
    values = jnp.where(values == values, values, -jnp.inf)

    def take(j, carry):
        left, best, chosen = carry
        largest = jnp.max(jnp.where(left < n, values, -jnp.inf), axis=0)
        first = jnp.min(jnp.where(values == largest, left, n), axis=0)
        left = jnp.where(left == first, n, left)
        return left, jnp.where(nth == j, largest, best), jnp.where(nth == j, first, chosen)

    start = ids, jnp.full((most,), -jnp.inf, jnp.float32), jnp.full((most,), n, jnp.int32)
    _, best, chosen = jax.lax.fori_loop(0, k, take, start)
    return best, chosen, nth
