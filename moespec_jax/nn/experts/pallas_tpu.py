"""Expert compute as one fused TPU kernel over the `Flat` layout: each distinct expert's weights are read once, tiled.

The grid runs over slots and tiles of the ffn axis. Pallas fetches the next step's tile while this one is computed, and
fetches nothing where the block does not change: unused slots repeat the last used one and cost an empty step each.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.slots import SLOT_TOKENS, distinct_experts, slot_experts
from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Matrix, Quantized
from moespec_jax.nn.routing import Routing, combine_weights

# Two buffers of one tile of each of three matrices: what fits beside the rest in the 16 MiB of v5e and v5p.
WEIGHT_BUFFER_BYTES = 12 * 2**20
LANES = 128


def pallas_experts(activation: str) -> ExpertCompute:
    """Expert compute over the `Flat` layout for TPU; `layer` may be traced.

    Elsewhere than on TPU the same kernel runs interpreted, which is slow and meant for tests. More than `SLOT_TOKENS`
    tokens run in sorted blocks, as under `slots`.
    """
    many_tokens = slot_experts(activation)

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        if x.shape[0] > SLOT_TOKENS:
            return many_tokens(experts, layer, x, routing)
        ids, active = distinct_experts(routing, experts.num_experts)
        rows = jnp.asarray(layer, jnp.int32) * experts.num_experts + ids
        combine = combine_weights(routing, ids)
        arguments = (x, experts.gate, experts.up, experts.down, combine, rows, active)
        run = partial(fused_experts, activation)
        return jax.lax.platform_dependent(*arguments, tpu=run, default=partial(run, interpret=True))

    return compute


def fused_experts(
    activation: str,
    x: Float[Array, "tokens model"],
    gate: Float[Matrix, "all model ffn"],
    up: Float[Matrix, "all model ffn"],
    down: Float[Matrix, "all ffn model"],
    combine: Float[Array, "tokens slots"],
    rows: Int[Array, " slots"],
    active: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens model"]:
    """All tokens through the experts in the first `active` of `rows`, weighted by `combine` and summed, float32.

    `rows` index the flat weights and must lie within them even past `active`, where they are not read.
    """
    quantized = isinstance(gate, Quantized)
    stored = gate.values if isinstance(gate, Quantized) else gate
    (tokens, model), slots, ffn = x.shape, rows.shape[0], stored.shape[2]
    tile = ffn_tile(model, ffn, stored.dtype.itemsize)
    tiles = ffn // tile

    def held(slot: Array, active: Array) -> Array:
        return jnp.minimum(slot, jnp.maximum(active[0] - 1, 0))

    def up_block(slot: Array, f: Array, rows: Array, active: Array) -> tuple[Array | int, ...]:
        return rows[held(slot, active)], 0, jnp.where(slot < active[0], f, tiles - 1)

    def down_block(slot: Array, f: Array, rows: Array, active: Array) -> tuple[Array | int, ...]:
        row, zero, tile_index = up_block(slot, f, rows, active)
        return row, tile_index, zero

    def scale_block(slot: Array, f: Array, rows: Array, active: Array) -> tuple[Array | int, ...]:
        return rows[held(slot, active)], 0, 0

    whole = pl.BlockSpec((tokens, model), lambda *_: (0, 0))
    # A quantized matrix comes with the steps of its output channels, as one row.
    column, step = pl.BlockSpec((1, model, tile), up_block), pl.BlockSpec((1, 1, tile), up_block)
    last, last_step = pl.BlockSpec((1, tile, model), down_block), pl.BlockSpec((1, 1, model), scale_block)
    weights = [column, step, column, step, last, last_step] if quantized else [column, column, last]
    operands = [part for w in (gate, up, down) for part in _as_operands(w)]
    if quantized and not interpret:
        # Else the compiler may move the steps of all experts of all layers to VMEM, for every call.
        operands = [pltpu.with_memory_space_constraint(part, pltpu.MemorySpace.HBM) for part in operands]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(slots, tiles),
        in_specs=[
            whole,
            *weights,
            pl.BlockSpec((1, tokens, 1), lambda slot, f, rows, active: (held(slot, active), 0, 0)),
        ],
        out_specs=whole,
    )
    return pl.pallas_call(
        partial(_kernel, activation),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((tokens, model), jnp.float32),
        # Without it the scheduler takes the call to read the weights of all experts of all layers.
        cost_estimate=pl.CostEstimate(
            flops=6 * tokens * slots * model * ffn,
            bytes_accessed=slots * sum(part.nbytes // len(part) for part in operands),
            transcendentals=tokens * slots * ffn,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
    )(rows, active[None], x, *operands, combine.T[:, :, None])


def ffn_tile(model: int, ffn: int, itemsize: int) -> int:
    """Width of a tile: the largest divisor of `ffn` in whole lanes whose buffers fit, or `ffn` where it has none."""
    widths = [w for w in range(LANES, ffn + 1, LANES) if ffn % w == 0]
    fitting = [w for w in widths if 6 * model * w * itemsize <= WEIGHT_BUFFER_BYTES]
    return max(fitting, default=min(widths, default=ffn))


def _as_operands(weights: Matrix) -> list[Array]:
    return [weights.values, weights.scale] if isinstance(weights, Quantized) else [weights]


def _kernel(activation, rows, active, x_ref, *refs):
    *weight_refs, combine_ref, out_ref = refs
    each = len(weight_refs) // 3
    gate, up, down = (weight_refs[i * each : (i + 1) * each] for i in range(3))
    slot, f = pl.program_id(0), pl.program_id(1)

    @pl.when((slot == 0) & (f == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(slot < active[0])
    def _():
        x, weight = x_ref[...], combine_ref[0]
        hidden = ACTIVATIONS[activation](_times(x, gate)) * _times(x, up)
        # Select, do not multiply by 0: an expert's inf must not turn into NaN for tokens that never chose it.
        out_ref[...] += jnp.where(weight > 0, _times(hidden.astype(x.dtype), down) * weight, 0.0)


def _times(x, refs):
    """`x` times the block of a matrix, and each output channel times its step where it has one."""
    out = jnp.dot(x, refs[0][0].astype(x.dtype), preferred_element_type=jnp.float32)
    return out * refs[1][0] if len(refs) > 1 else out
