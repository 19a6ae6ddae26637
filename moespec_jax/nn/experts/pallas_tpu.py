"""Expert compute as one fused TPU kernel over the `Flat` layout: each distinct expert's weights are read once, tiled.

The grid runs over slots and tiles of the ffn axis. Pallas fetches the next step's tile during the computation of this
one, and fetches nothing where the block does not change: unused slots repeat the block of the last slot in use, and
each costs an empty step.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moespec_jax.config import Activation, ClampedSwiglu
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.slots import SLOT_TOKENS, distinct_experts, slot_experts
from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Mxfp4, Quantized
from moespec_jax.nn.routing import Routing, combine_weights

# For one tile of each of three matrices, double-buffered; a kernel may use 16 MiB in all on v5e and v5p.
WEIGHT_BUFFER_BYTES = 12 * 2**20
LANES = 128


def pallas_experts(activation: Activation) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout for TPU; `layer` may be traced.

    On other platforms the kernel is interpreted, which is slow, for tests. More than `SLOT_TOKENS` tokens run in
    blocks of rows sorted by expert, as in the back-end `slots`, and so does what the kernel does not support
    (`missing`).
    """
    plain = slot_experts(activation)

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        if x.shape[0] > SLOT_TOKENS or missing(activation, experts, x.dtype) is not None:
            return plain(experts, layer, x, routing)
        assert isinstance(activation, str)
        ids, active = distinct_experts(routing, experts.num_experts)
        rows = jnp.asarray(layer, jnp.int32) * experts.num_experts + ids
        combine = combine_weights(routing, ids)
        arguments = (x, experts.gate, experts.up, experts.down, combine, rows, active)
        run = partial(fused_experts, activation)
        return jax.lax.platform_dependent(*arguments, tpu=run, default=partial(run, interpret=True))

    return compute


def missing(activation: Activation, experts: object, dtype: DTypeLike) -> str | None:
    """Name what the kernel does not support: biases, MXFP4, and activations of both products; None if it runs."""
    if isinstance(experts, Flat) and experts.gate_bias is not None:
        return "experts with biases"
    if isinstance(experts, Flat) and isinstance(experts.gate, Mxfp4):
        return "experts in MXFP4"
    return f"the activation {activation}" if isinstance(activation, ClampedSwiglu) else None


def fused_experts(
    activation: str,
    x: Float[Array, "tokens model"],
    gate: Float[Array, "all model ffn"] | Quantized,
    up: Float[Array, "all model ffn"] | Quantized,
    down: Float[Array, "all ffn model"] | Quantized,
    combine: Float[Array, "tokens slots"],
    rows: Int[Array, " slots"],
    active: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens model"]:
    """Run all tokens through the experts of the first `active` slots, and sum the outputs by combine weight, float32.

    Args:
        activation: name of the activation.
        x: tokens.
        gate: matrices of all experts of all sparse layers.
        up: as `gate`.
        down: as `gate`.
        combine: combine weight of every slot's expert for every token.
        rows: index of every slot's expert in the matrices; valid in unused slots too, whose matrices are not read.
        active: number of slots in use.
        interpret: whether to interpret the kernel, on any platform.
    """
    quantized = isinstance(gate, Quantized)
    stored = gate.values if isinstance(gate, Quantized) else gate
    (tokens, model), slots, ffn = x.shape, rows.shape[0], stored.shape[2]
    tile = ffn_tile(model, ffn, stored.dtype.itemsize)
    tiles = ffn // tile

    # Index maps get `rows` and `active` as references to scalar memory.
    def clamp(slot: Array, active: Any) -> Array:
        return jnp.minimum(slot, jnp.maximum(active[0] - 1, 0))

    def up_block(slot: Array, f: Array, rows: Any, active: Any) -> tuple[Array | int, ...]:
        return rows[clamp(slot, active)], 0, jnp.where(slot < active[0], f, tiles - 1)

    def down_block(slot: Array, f: Array, rows: Any, active: Any) -> tuple[Array | int, ...]:
        row, zero, tile_index = up_block(slot, f, rows, active)
        return row, tile_index, zero

    def scale_block(slot: Array, f: Array, rows: Any, active: Any) -> tuple[Array | int, ...]:
        return rows[clamp(slot, active)], 0, 0

    whole = pl.BlockSpec((tokens, model), lambda *_: (0, 0))
    # Each quantized matrix is followed by the scales of its output channels, as one row.
    columns, scales = pl.BlockSpec((1, model, tile), up_block), pl.BlockSpec((1, 1, tile), up_block)
    down_rows, down_scales = pl.BlockSpec((1, tile, model), down_block), pl.BlockSpec((1, 1, model), scale_block)
    plain = [columns, columns, down_rows]
    weights = [columns, scales, columns, scales, down_rows, down_scales] if quantized else plain
    operands = [part for w in (gate, up, down) for part in _as_operands(w)]
    if quantized and not interpret:
        # Without the constraint, the compiler may move the scales of all experts of all layers to VMEM for every call.
        operands = [pltpu.with_memory_space_constraint(part, pltpu.MemorySpace.HBM) for part in operands]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(slots, tiles),
        in_specs=[
            whole,
            *weights,
            pl.BlockSpec((1, tokens, 1), lambda slot, f, rows, active: (clamp(slot, active), 0, 0)),
        ],
        out_specs=whole,
    )
    return pl.pallas_call(
        partial(_kernel, activation),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((tokens, model), jnp.float32),
        # Without an estimate, the scheduler assumes that the call reads the weights of all experts of all layers.
        cost_estimate=pl.CostEstimate(
            flops=6 * tokens * slots * model * ffn,
            bytes_accessed=slots * sum(part.nbytes // len(part) for part in operands),
            transcendentals=tokens * slots * ffn,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
    )(rows, active[None], x, *operands, combine.T[:, :, None])


def ffn_tile(model: int, ffn: int, itemsize: int) -> int:
    """Choose the width of a tile: the largest divisor of `ffn` that is a multiple of `LANES` and whose buffers fit,
    the smallest such multiple where none fits, or `ffn` where it has none."""
    widths = [w for w in range(LANES, ffn + 1, LANES) if ffn % w == 0]
    fitting = [w for w in widths if 6 * model * w * itemsize <= WEIGHT_BUFFER_BYTES]
    return max(fitting, default=min(widths, default=ffn))


def _as_operands(weights: Array | Quantized) -> list[Array]:
    """List the operands of the kernel for some matrices: values, and scales if they are quantized."""
    return [weights.values, weights.scale] if isinstance(weights, Quantized) else [weights]


def _kernel(activation, rows, active, x_ref, *refs):
    """Add one ffn tile of one slot's expert to the output."""
    *weight_refs, combine_ref, out_ref = refs
    per_matrix = len(weight_refs) // 3
    gate, up, down = (weight_refs[i * per_matrix : (i + 1) * per_matrix] for i in range(3))
    slot, f = pl.program_id(0), pl.program_id(1)

    @pl.when((slot == 0) & (f == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(slot < active[0])
    def _():
        x, weight = x_ref[...], combine_ref[0]
        hidden = ACTIVATIONS[activation](_times(x, gate)) * _times(x, up)
        # Select instead of multiplying by 0: inf of an expert would become NaN for tokens that do not use it.
        out_ref[...] += jnp.where(weight > 0, _times(hidden.astype(x.dtype), down) * weight, 0.0)


def _times(x, refs):
    """Multiply `x` by the block of a matrix, then each output channel by its scale where the matrix is quantized."""
    out = jnp.dot(x, refs[0][0].astype(x.dtype), preferred_element_type=jnp.float32)
    return out * refs[1][0] if len(refs) > 1 else out
