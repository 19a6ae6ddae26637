"""Expert compute as two fused Triton kernels over the `Flat` layout: each distinct expert's weights are read once.

For Ampere, Ada and newer GPUs (`supported`). Lowered for CUDA and compiled for several of them, all on hosts without a
GPU, and interpreted, but never run on a device yet: therefore opt-in.

Pallas' Triton lowering is deprecated since jax 0.11 in favour of Mosaic, and warns so. It is used nevertheless: before
Hopper, no other form that we know reads experts where they lie. XLA copies an expert ahead of every product of several
rows, and as of jax 0.12 even a trivial Mosaic kernel does not compile for Ampere.

The first launch makes every slot's hidden rows, the second its output rows. A block of threads makes one tile of 64
columns and streams just the weights above it; blocks of unused slots return at once. XLA adds up the slots.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from moespec_jax.nn.experts.gpu import kernel_experts
from moespec_jax.nn.experts.slots import add_slots
from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute

# Columns of a block of threads, and how many rows of weights it multiplies at once.
TILE = 64
# The fewest rows of Triton's matrix product; row counts are powers of 2.
FEWEST_ROWS = 16
# One stage computes while the others' tiles arrive: up to 72 KiB, of the 99 that Ada gives a block of threads.
STAGES, WARPS = 4, 4

# What lowers in Triton: `erfc` (exact gelu) does not.
KERNEL_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    name: ACTIVATIONS[name] for name in ("silu", "swish", "gelu_pytorch_tanh", "relu")
}


def triton_experts(activation: str) -> ExpertCompute:
    """Expert compute over the `Flat` layout for NVIDIA GPUs (`gpu.kernel_experts`)."""
    return kernel_experts(activation, KERNEL_ACTIVATIONS, TILE, fused_experts)


def supported(device: object) -> bool:
    """Whether it is an NVIDIA GPU of Ampere or later: older ones do not multiply bfloat16."""
    # Those of AMD's are no numbers.
    return re.fullmatch(r"([89]|\d\d)\.\d", getattr(device, "compute_capability", None) or "") is not None


def fused_experts(
    activation: str,
    x: Float[Array, "tokens model"],
    gate: Float[Array, "all model ffn"],
    up: Float[Array, "all model ffn"],
    down: Float[Array, "all ffn model"],
    combine: Float[Array, "tokens slots"],
    rows: Int[Array, " slots"],
    active: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens model"]:
    """All tokens through the experts in the first `active` of `rows`, weighted by `combine` and summed, float32.

    `rows` index the flat weights and are not looked at past `active`.
    """
    tokens = x.shape[0]
    run = partial(_multiply, rows=rows, active=active[None], interpret=interpret)

    def gated(gate: Array, up: Array) -> Array:
        return KERNEL_ACTIVATIONS[activation](gate) * up

    padded = jnp.pad(x, ((0, max(FEWEST_ROWS, pl.next_power_of_2(tokens)) - tokens), (0, 0)))
    hidden = run(gated, padded, (gate, up), dtype=x.dtype)
    out = run(lambda y: y, hidden, (down,), dtype=jnp.float32)
    return add_slots(out[:, :tokens], combine, active)


def _multiply(
    finish: Callable[..., Array],
    x: Float[Array, "*slots rows inner"],
    weights: tuple[Float[Array, "all inner columns"], ...],
    *,
    rows: Int[Array, " slots"],
    active: Int[Array, "1"],
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> Float[Array, "slots rows columns"]:
    """`finish` of `x` times every slot's matrices; the rows of unused slots are undefined."""
    slots, height, (_, inner, columns) = rows.shape[0], x.shape[-2], weights[0].shape

    def block(rows, active, x, *references):
        *weights, out = references
        # Neighbours in the first axis run together: they read neighbouring columns of the same rows.
        across, slot = pl.ds(pl.program_id(0) * TILE, TILE), pl.program_id(1)

        @pl.when(slot < active[0])
        def _():
            row = rows[slot]

            def step(k, sums):
                along = pl.ds(k * TILE, TILE)
                left = x[slot, :, along] if x.ndim == 3 else x[:, along]
                return tuple(
                    total + jnp.dot(left, matrix[row, along, across], preferred_element_type=jnp.float32)
                    for total, matrix in zip(sums, weights, strict=True)
                )

            sums = (jnp.zeros((height, TILE), jnp.float32),) * len(weights)
            out[slot, :, across] = finish(*jax.lax.fori_loop(0, inner // TILE, step, sums)).astype(dtype)

    # No block is cut from any array: the kernel is given where they begin, and moves what it indexes.
    return pl.pallas_call(
        block,
        grid=(columns // TILE, slots),
        out_shape=jax.ShapeDtypeStruct((slots, height, columns), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(rows, active, x, *weights)
