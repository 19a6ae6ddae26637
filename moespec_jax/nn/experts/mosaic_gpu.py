"""Expert compute as two fused Hopper kernels over the `Flat` layout: each distinct expert's weights are read once.

Measured on an H100 (`docs/gpu.md`), and emulated in tests. They need `wgmma`, which only Hopper GPUs have (H100, H200,
GH200).

The first launch computes act(gate(x)) * up(x) for every slot, the second multiplies by `down`. A thread block computes
one tile of 64 columns and reads those columns of the weights only; those of slots without an expert return at once.
XLA sums over slots, or over each token's rows (`gpu.py`).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moespec_jax.config import Activation
from moespec_jax.nn.experts.gpu import kernel_experts, unsupported
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Mxfp4, Quantized

# Rows of a wgmma, and the largest width, in 16-bit numbers, of a tile that TMA swizzles.
TILE = 64
# Pipeline steps whose tiles are in shared memory at once: up to 104 KiB, so that two thread blocks fit into the
# 227 KiB of a streaming multiprocessor.
STAGES = 4

# Activations that Mosaic lowers: not `erfc` (exact gelu), nor the custom derivative of `jax.nn.relu` in jax 0.10.
KERNEL_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **{name: ACTIVATIONS[name] for name in ("silu", "swish", "gelu_pytorch_tanh")},
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def mosaic_experts(activation: Activation) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout for Hopper GPUs (`gpu.kernel_experts`)."""
    return kernel_experts(activation, missing, slot_outputs)


def missing(activation: Activation, experts: Flat, dtype: DTypeLike) -> str | None:
    """Name what the kernels do not support: besides `gpu.unsupported`, quantized experts, biases and activations."""
    if isinstance(experts.gate, Quantized | Mxfp4):
        return "quantized experts"
    if experts.gate_bias is not None:
        return "experts with biases"
    if activation not in KERNEL_ACTIVATIONS:
        return f"the activation {activation}"
    return unsupported(experts.gate.dtype, experts.gate.shape[1:], dtype, TILE)


def supported(device: object) -> bool:
    """Test whether a device can run the kernels. On others, compiling them may end the process: test beforehand."""
    return getattr(device, "compute_capability", None) == "9.0"


def slot_outputs(
    activation: Activation,
    x: Float[Array, "*slots tokens model"],
    experts: Flat,
    first: Int[Array, ""],
    ids: Int[Array, " slots"],
    *,
    interpret: object = None,
) -> Float[Array, "slots tokens model"]:
    """Run tokens through the expert of every slot, float32; the output of slots without an expert is undefined.

    Args:
        activation: name of the activation.
        x: at most `TILE` tokens of every slot, or, with two axes, tokens that all slots share.
        experts: matrices of all experts of all sparse layers.
        first: index of the layer's first expert in the matrices.
        ids: expert of every slot, counted from the layer's first; `num_experts` where there is none.
        interpret: settings of Pallas' GPU emulator, for tests; None compiles the kernels.
    """
    tokens = x.shape[-2]
    gate, up, down = experts.gate, experts.up, experts.down
    assert isinstance(gate, Array) and isinstance(up, Array) and isinstance(down, Array)
    run = partial(_multiply, ids=ids, first=first[None], num_experts=experts.num_experts, interpret=interpret)

    assert isinstance(activation, str)

    def gated(gate: Array, up: Array) -> Array:
        return KERNEL_ACTIVATIONS[activation](gate) * up

    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, TILE - tokens), (0, 0)])
    hidden = run(gated, padded, (gate, up), kept=TILE, dtype=x.dtype)
    # A slice of a swizzled tile has a multiple of 8 rows.
    return run(lambda y: y, hidden, (down,), kept=-(-tokens // 8) * 8, dtype=jnp.float32)[:, :tokens]


def _multiply(
    finish: Callable[..., Array],
    x: Float[Array, "*slots rows inner"],
    weights: tuple[Float[Array, "all inner columns"], ...],
    *,
    ids: Int[Array, " slots"],
    first: Int[Array, "1"],
    num_experts: int,
    kept: int,
    dtype: jax.typing.DTypeLike,
    interpret: object,
) -> Float[Array, "slots kept columns"]:
    """Compute `finish` of the products of `x` with every slot's matrices, one launch.

    Args:
        finish: elementwise function of one float32 product for each of `weights`.
        x: rows of every slot, or, with two axes, rows that all slots share.
        weights: matrices of all experts.
        ids: expert of every slot.
        first: index in the matrices of the expert of id 0.
        num_experts: ids from here on stand for none; the output of their slots is undefined.
        kept: number of rows to write, of those of `x`.
        dtype: dtype of the output.
        interpret: settings of Pallas' GPU emulator.
    """
    slots, (_, inner, columns) = ids.shape[0], weights[0].shape

    def block(ids, first, x, *references):
        *weights, out, tile = references
        slot, column = jax.lax.axis_index("slot"), jax.lax.axis_index("column")

        @pl.when(ids[slot] < num_experts)
        def _():
            matrices = [matrix.at[first[0] + ids[slot]] for matrix in weights]
            products = _stream(inner // TILE, column, x.at[slot] if x.ndim == 3 else x, matrices)
            tile[...] = finish(*products).astype(dtype)
            plgpu.commit_smem()
            target = (slot, slice(None), pl.ds(column * TILE, TILE))
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, kept)], out.at[target])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct((slots, kept, columns), dtype),
        scratch_types=[plgpu.SMEM((TILE, TILE), dtype, transforms=_swizzled(dtype))],
        grid=(slots, columns // TILE),
        grid_names=("slot", "column"),
        interpret=interpret,
    )(ids, first, x, *weights)


def _stream(steps: int, column, x, matrices) -> tuple[Array, ...]:
    """Compute float32 products of `x` with one column of tiles of each matrix, prefetched by `STAGES` steps."""
    across = plgpu.BlockSpec((TILE, TILE), lambda k: (0, k), transforms=_swizzled(x.dtype), delay_release=1)
    along = plgpu.BlockSpec((TILE, TILE), lambda k: (k, column), transforms=_swizzled(x.dtype), delay_release=1)

    def accumulate(*sums):
        def step(_, x_tile, *tiles):
            for total, tile in zip(sums, tiles, strict=True):
                plgpu.wgmma(total, x_tile, tile)
            # `delay_release=1`: the previous step's tiles are overwritten next, so its products must be finished.
            plgpu.wgmma_wait(len(sums))

        specs = [across] + [along] * len(sums)
        plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=STAGES)(x, *matrices)
        return tuple(total[...] for total in sums)

    return pl.run_scoped(accumulate, *[plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32)] * len(matrices))


def _swizzled(dtype: jax.typing.DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Build the layout of tiles in shared memory that wgmma reads, free of bank conflicts; 128 is in bytes."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
