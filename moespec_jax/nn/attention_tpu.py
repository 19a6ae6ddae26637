"""Attention of a few tokens over one layer of the stacked cache, as one fused TPU kernel.

From plain operations, the TPU compiler writes the float32 scores of a tree's nodes to memory and reads them twice, and
on some chips it first copies the layer's cache. In this kernel one grid step computes all queries of a key/value head
over one tile of its slots, indexed by layer in the stacked cache; scores stay in VMEM. Over several tiles the softmax
is computed online (arXiv:1805.02867), with running maxima and sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.nn.attention import attend_layer

# The most is that of the expert kernel. One token has few scores: by the compiler's estimate, the kernel makes
# decoding 0.1 % faster with one query head to a key/value head, and 0.4 % slower with eight.
FEWEST_TOKENS, MOST_TOKENS = 2, 64
# A kernel may use 16 MiB on v5e and v5p; the rest is for what the estimate in `slot_tile` omits.
VMEM_BYTES = 12 * 2**20
LANES = 128
MASKED = float(jnp.finfo(jnp.float32).min)


def attend_layer_tpu(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "*layers batch kv_heads slots head"],
    v: Float[Array, "*layers batch kv_heads slots head"],
    layer: Int[Array, ""] | None,
    mask: Bool[Array, "batch tokens slots"],
) -> Float[Array, "batch tokens q_out"]:
    """Compute `attend_layer`: on TPU with the fused kernel where it `fits`, elsewhere with plain operations.

    The compiler cannot partition a kernel: the cache must not be sharded by the compiler (axes of type Auto).
    """
    if layer is None or not fits(q, k):
        return attend_layer(q, k, v, layer, mask)
    return jax.lax.platform_dependent(q, k, v, layer, mask, tpu=fused_attention, default=attend_layer)


def fused_attention(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "layers batch kv_heads slots head"],
    v: Float[Array, "layers batch kv_heads slots head"],
    layer: Int[Array, ""],
    mask: Bool[Array, "batch tokens slots"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch tokens q_out"]:
    """Compute `attend_layer` with the kernel, interpreted with `interpret`.

    Masked slots may contain any finite numbers. A row whose mask is false everywhere averages over all slots.
    """
    (batch, tokens, heads, head), (groups, slots) = q.shape, k.shape[2:4]
    per_group, rows, tile = heads // groups, _padded(tokens), slot_tile(q, k)
    assert tile is not None, f"no tile of {slots} slots fits"
    pad = (0, rows - tokens)
    grouped = jnp.pad(q.reshape(batch, tokens, groups, per_group, head), ((0, 0), pad, (0, 0), (0, 0), (0, 0)))
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per_group * rows, head)
    attended = jnp.pad(mask.astype(jnp.int8), ((0, 0), pad, (0, 0)))
    if not interpret:
        # Without the constraint, the compiler may move a small model's whole cache to VMEM for the call.
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for x in (k, v))
    queries = pl.BlockSpec((1, 1, per_group * rows, head), lambda b, g, t, layer: (b, g, 0, 0))
    cached = pl.BlockSpec((1, 1, 1, tile, head), lambda b, g, t, layer: (layer[0], b, g, t, 0))
    out = pl.pallas_call(
        partial(_kernel, rows, head**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups, slots // tile),
            in_specs=[queries, cached, cached, pl.BlockSpec((1, rows, tile), lambda b, g, t, layer: (b, 0, t))],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((per_group * rows, width), jnp.float32) for width in (1, 1, head)],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        # Without an estimate, the scheduler assumes that the call reads the caches of all layers.
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * rows * slots * head,
            bytes_accessed=2 * grouped.nbytes
            + (k.nbytes + v.nbytes) // len(k)
            + attended.nbytes * (groups if tile < slots else 1),
            transcendentals=batch * heads * rows * slots,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(jnp.asarray(layer, jnp.int32)[None], grouped, k, v, attended)
    out = out.reshape(batch, groups, per_group, rows, head)[:, :, :, :tokens]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head)


def fits(q: Array, k: Array) -> bool:
    """Test whether tokens are few, a head is a multiple of `LANES` wide (for others the compiler copies the cache),
    and a tile fits."""
    few = FEWEST_TOKENS <= q.shape[1] <= MOST_TOKENS
    return few and q.shape[3] % LANES == 0 and slot_tile(q, k) is not None


def slot_tile(q: Array, k: Array) -> int | None:
    """Choose the number of slots of a tile: all, if they fit in `VMEM_BYTES`, or else their number's largest divisor
    that fits and is a multiple of `LANES`; None if none fits."""
    heads, head, (groups, slots), size = q.shape[2], q.shape[3], k.shape[2:4], k.dtype.itemsize
    rows, width = _padded(q.shape[1]), -(-head // LANES) * LANES
    # Queries and results, double-buffered; the running sum; and columns of maxima and of sums, padded to lanes.
    fixed = heads // groups * rows * (4 * width * size + 4 * width + 8 * LANES)
    # Keys, values and mask, double-buffered; scores, weights and intermediate values.
    slot = 4 * width * size + 2 * rows + 4 * rows * 4
    most = (VMEM_BYTES - fixed) // slot
    divisors = (n for n in range(LANES, slots, LANES) if slots % n == 0 and n <= most)
    return slots if slots <= most else max(divisors, default=None)


def _padded(tokens: int) -> int:
    """Round up to the rows of a register of 16-bit numbers."""
    return -(-tokens // 16) * 16


def _kernel(rows, scale, layer, q_ref, k_ref, v_ref, mask_ref, out_ref, max_ref, total_ref, sum_ref):
    """Add one tile of slots to the online softmax of one key/value head.

    Scratch: `max_ref` running maximum of the scores, `total_ref` running sum of exp(score - maximum), `sum_ref`
    running sum of values with these weights.
    """
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    keys, values, mask = k_ref[0, 0, 0], v_ref[0, 0, 0], mask_ref[0].astype(jnp.int32) > 0
    for first in range(0, q_ref.shape[2], rows):
        query_head = slice(first, first + rows)
        product = jax.lax.dot_general(
            q_ref[0, 0, query_head], keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask, product * scale, MASKED)
        old_max = max_ref[query_head]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=-1, keepdims=True))
        weights, rescale = jnp.exp(scores - new_max), jnp.exp(old_max - new_max)
        max_ref[query_head] = new_max
        total_ref[query_head] = total_ref[query_head] * rescale + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        sum_ref[query_head] = sum_ref[query_head] * rescale + mixed

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        out_ref[0, 0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)
