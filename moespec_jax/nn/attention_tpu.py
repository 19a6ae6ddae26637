"""Attention of a few tokens over one layer of the stacked cache, as one fused TPU kernel.

Left to itself, the TPU compiler writes the scores of a tree's nodes in float32 and reads them twice, and on some chips
copies the layer's cache first. Here one grid step takes all queries of a key/value head through a tile of its slots,
read from the whole cache by layer; scores stay where they are made. A cache of several tiles goes by running maxima and
sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.nn.attention import attend_layer

# As many as the expert kernel takes; one token's scores are too few to matter: by the compiler's count, decoding gains
# a thousandth from the kernel with one query a key/value head, and loses four with eight.
FEWEST_TOKENS, MOST_TOKENS = 2, 64
# Of the 16 MiB that a kernel may use on v5e and v5p, and some for what the estimate leaves out.
VMEM_BYTES = 12 * 2**20
LANES = 128
HIDDEN = float(jnp.finfo(jnp.float32).min)


def attend_layer_tpu(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "layers batch kv_heads slots head"],
    v: Float[Array, "layers batch kv_heads slots head"],
    layer: Int[Array, ""],
    mask: Bool[Array, "batch tokens slots"],
) -> Float[Array, "batch tokens q_out"]:
    """As `attend_layer`; on TPU, where it `fits`, by the kernel below.

    A kernel cannot be split by the compiler: not for caches that are spread over a mesh.
    """
    if not fits(q, k):
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
    """As `attend_layer`: softmax in float32, groups of `heads / kv_heads` queries to a key/value head.

    Slots that a row does not see may hold any finite numbers. A row that sees nothing averages over all slots.
    """
    (batch, tokens, heads, head), (groups, slots) = q.shape, k.shape[2:4]
    per, rows, tile = heads // groups, _padded(tokens), slot_tile(q, k)
    assert tile is not None, f"no tile of {slots} slots fits"
    pad = (0, rows - tokens)
    grouped = jnp.pad(q.reshape(batch, tokens, groups, per, head), ((0, 0), pad, (0, 0), (0, 0), (0, 0)))
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, groups, per * rows, head)
    seen = jnp.pad(mask.astype(jnp.int8), ((0, 0), pad, (0, 0)))
    if not interpret:
        # Else the compiler may move a small model's whole cache to VMEM for the call.
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.MemorySpace.HBM) for x in (k, v))
    mine = pl.BlockSpec((1, 1, per * rows, head), lambda b, g, t, layer: (b, g, 0, 0))
    cached = pl.BlockSpec((1, 1, 1, tile, head), lambda b, g, t, layer: (layer[0], b, g, t, 0))
    out = pl.pallas_call(
        partial(_kernel, rows, head**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups, slots // tile),
            in_specs=[mine, cached, cached, pl.BlockSpec((1, rows, tile), lambda b, g, t, layer: (b, 0, t))],
            out_specs=mine,
            scratch_shapes=[pltpu.VMEM((per * rows, width), jnp.float32) for width in (1, 1, head)],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        # Without it the scheduler takes the call to read the caches of all layers.
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * rows * slots * head,
            bytes_accessed=2 * grouped.nbytes
            + (k.nbytes + v.nbytes) // len(k)
            + seen.nbytes * (groups if tile < slots else 1),
            transcendentals=batch * heads * rows * slots,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(jnp.asarray(layer, jnp.int32)[None], grouped, k, v, seen)
    out = out.reshape(batch, groups, per, rows, head)[:, :, :, :tokens]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head)


def fits(q: Array, k: Array) -> bool:
    """Whether tokens are few, heads whole lanes (else the compiler copies the cache for it), and a tile fits."""
    few = FEWEST_TOKENS <= q.shape[1] <= MOST_TOKENS
    return few and q.shape[3] % LANES == 0 and slot_tile(q, k) is not None


def slot_tile(q: Array, k: Array) -> int | None:
    """Slots in a tile: all that fit, or else the largest divisor of their number in whole lanes; None if none fits."""
    heads, head, (groups, slots), size = q.shape[2], q.shape[3], k.shape[2:4], k.dtype.itemsize
    rows, width = _padded(q.shape[1]), -(-head // LANES) * LANES
    # Queries and result in two buffers each, the running sum, and a column each of maxima and of sums.
    fixed = heads // groups * rows * (4 * width * size + 4 * width + 8 * LANES)
    # Keys, values and mask in two buffers each, and scores, weights and what comes between them.
    slot = 4 * width * size + 2 * rows + 4 * rows * 4
    most = (VMEM_BYTES - fixed) // slot
    divisors = (n for n in range(LANES, slots, LANES) if slots % n == 0 and n <= most)
    return slots if slots <= most else max(divisors, default=None)


def _padded(tokens: int) -> int:
    """Rows of whole registers, of two-byte numbers too."""
    return -(-tokens // 16) * 16


def _kernel(rows, scale, layer, q_ref, k_ref, v_ref, seen_ref, out_ref, highest_ref, total_ref, sum_ref):
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        highest_ref[...] = jnp.full_like(highest_ref, HIDDEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    keys, values, seen = k_ref[0, 0, 0], v_ref[0, 0, 0], seen_ref[0].astype(jnp.int32) > 0
    for first in range(0, q_ref.shape[2], rows):
        mine = slice(first, first + rows)
        product = jax.lax.dot_general(
            q_ref[0, 0, mine], keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, product * scale, HIDDEN)
        before = highest_ref[mine]
        highest = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - highest), jnp.exp(before - highest)
        highest_ref[mine] = highest
        total_ref[mine] = total_ref[mine] * kept + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        sum_ref[mine] = sum_ref[mine] * kept + mixed

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        out_ref[0, 0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)
