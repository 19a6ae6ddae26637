"""Attention of a few tokens over one layer's cache by two Triton kernels.

From plain operations, XLA:GPU writes the float32 scores of a tree's nodes to memory and reads them twice. In the first
kernel a thread block computes a tile of queries of one key/value head over a part of the slots, with an online softmax
(arXiv:1805.02867); the second adds up the parts. Tiles of slots that no query attends to, such as the free ones at the
end of the cache, are not read.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.nn.attention import attend, attend_layer
from moespec_jax.nn.experts.gpu import DTYPES

# More tokens (a prompt) are attended to in plain operations.
MOST_TOKENS = 64
# Rows of Triton's smallest matrix product, and of a thread block's queries at most.
FEWEST_ROWS, MOST_ROWS = 16, 64
# Slots of one step.
TILE = 64
HEAD_DIMS = (64, 128)
# Thread blocks among which the slots are divided, about one for each streaming multiprocessor.
BLOCKS = 128
# Stands for a score that is masked: exp of it is 0, and no difference of two is NaN.
MASKED = -1e30


def attend_gpu(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "*layers batch kv_heads slots head"],
    v: Float[Array, "*layers batch kv_heads slots head"],
    layer: Int[Array, ""] | None,
    mask: Bool[Array, "batch tokens slots"],
) -> Float[Array, "batch tokens q_out"]:
    """Compute `attend_layer`: on NVIDIA GPUs with the kernels where they fit, elsewhere with plain operations."""
    if layer is not None or not fits(q, k):
        return attend_layer(q, k, v, layer, mask)
    return jax.lax.platform_dependent(q, k, v, mask, cuda=fused_attention, default=attend)


def fits(q: Array, k: Array) -> bool:
    """Test whether tokens are few, numbers have 16 bits, and slots and heads are whole tiles."""
    few, dtype = q.shape[1] <= MOST_TOKENS, q.dtype == k.dtype and q.dtype in DTYPES
    return few and dtype and q.shape[3] in HEAD_DIMS and k.shape[2] % TILE == 0


def fused_attention(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "batch kv_heads slots head"],
    v: Float[Array, "batch kv_heads slots head"],
    mask: Bool[Array, "batch tokens slots"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch tokens q_out"]:
    """Compute `attend` with the kernels. A row whose mask is false everywhere is 0."""
    (batch, tokens, heads, head), (groups, slots) = q.shape, k.shape[1:3]
    per_group = heads // groups
    rows = tokens * per_group
    height = min(MOST_ROWS, max(FEWEST_ROWS, pl.next_power_of_2(rows)))
    tiles, steps = -(-rows // height), slots // TILE
    parts = 1
    while batch * groups * tiles * parts < BLOCKS and steps % (2 * parts) == 0:
        parts *= 2
    steps //= parts

    def kernel(q, k, v, mask, sums, totals, maxima):
        part, tile, sequence = pl.program_id(0), pl.program_id(1), jax.lax.div(pl.program_id(2), groups)
        group = jax.lax.rem(pl.program_id(2), groups)
        row, column = tile * height + jnp.arange(height, dtype=jnp.int32), jnp.arange(head, dtype=jnp.int32)
        # A row is one query head of one token.
        token = sequence * tokens + jax.lax.div(row, per_group)
        query = token * heads + group * per_group + jax.lax.rem(row, per_group)
        inside = row < rows
        queries = plgpu.load(q.at[query[:, None], column[None, :]], mask=inside[:, None], other=0.0)

        def step(i, carry):
            start = (part * steps + i) * TILE
            slot = start + jnp.arange(TILE, dtype=jnp.int32)
            seen = plgpu.load(mask.at[token[:, None], slot[None, :]], mask=inside[:, None], other=0)
            seen = seen.astype(jnp.int32)

            def add(carry):
                old_max, total, mixed = carry
                keys, values = (store[sequence, group, pl.ds(start, TILE), :] for store in (k, v))
                product = jax.lax.dot_general(
                    queries, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
                scores = jnp.where(seen > 0, product * head**-0.5, MASKED)
                new_max = jnp.maximum(old_max, jnp.max(scores, axis=1))
                weights = jnp.where(seen > 0, jnp.exp(scores - new_max[:, None]), 0.0)
                rescale = jnp.exp(old_max - new_max)
                new = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
                return new_max, total * rescale + jnp.sum(weights, axis=1), mixed * rescale[:, None] + new

            return jax.lax.cond(jnp.max(seen) > 0, add, lambda carry: carry, carry)

        start = jnp.full((height,), MASKED, jnp.float32), jnp.zeros((height,), jnp.float32)
        peak, total, mixed = jax.lax.fori_loop(0, steps, step, (*start, jnp.zeros((height, head), jnp.float32)))
        plgpu.store(sums.at[part, query[:, None], column[None, :]], mixed, mask=inside[:, None])
        plgpu.store(totals.at[part, query], total, mask=inside)
        plgpu.store(maxima.at[part, query], peak, mask=inside)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((parts, batch * tokens * heads, *sizes), jnp.float32)

    partial_sums = pl.pallas_call(
        kernel,
        grid=(parts, tiles, batch * groups),
        out_shape=(shape(head), shape(), shape()),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_parts",
    )(q.reshape(-1, head), k, v, mask.astype(jnp.int8).reshape(-1, slots))
    sums, totals, maxima = partial_sums
    return _add_parts(sums, totals, maxima, q.dtype, interpret).reshape(batch, tokens, heads * head)


def _add_parts(
    sums: Float[Array, "parts rows head"],
    totals: Float[Array, "parts rows"],
    maxima: Float[Array, "parts rows"],
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> Float[Array, "rows head"]:
    """Add the parts of every row's softmax: sums of values, sums of weights, and largest scores."""
    parts, rows, head = sums.shape

    def kernel(sums, totals, maxima, out):
        row, part = pl.program_id(0), jnp.arange(parts, dtype=jnp.int32)
        peak = maxima[part, row]
        scale = jnp.exp(peak - jnp.max(peak, axis=0))
        total = jnp.sum(totals[part, row] * scale, axis=0)
        mixed = jnp.sum(sums[:, row, :] * scale[:, None], axis=0)
        out[row, :] = (mixed / jnp.where(total > 0, total, 1.0)).astype(dtype)

    return pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, head), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="attention_sum",
    )(sums, totals, maxima)
