"""Expert compute as two fused Triton kernels over the `Flat` layout: each distinct expert's weights are read once.

For Ampere, Ada and newer GPUs (`supported`). Measured on an H100 (`docs/gpu.md`); compiled for other GPUs, and
interpreted in tests.

Pallas' Triton lowering is deprecated since jax 0.11 in favour of Mosaic, and emits a warning. It is used nevertheless:
for GPUs before Hopper we know no other way to read experts without a copy. XLA copies an expert before every product
of several rows, and as of jax 0.12 even a trivial Mosaic kernel does not compile for Ampere.

Weights are 16-bit floats, or int8 or MXFP4, which a thread block widens tile by tile.

The first launch computes act(gate(x)) * up(x) for every slot, the second multiplies by `down`. A thread block computes
one tile of 64 columns and reads those columns of the weights only; those of slots without an expert return at once.
XLA sums over slots, or over each token's rows (`gpu.py`).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moespec_jax.config import Activation, ClampedSwiglu
from moespec_jax.nn.experts.gpu import kernel_experts, unsupported
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import gated
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import BLOCK, Matrix, Mxfp4, Quantized, e2m1, powers_of_two

Slice = slice | pl.Slice

# Columns of a thread block, and rows of weights that it multiplies in one step.
TILE = 64
# Smallest number of rows of Triton's matrix product; numbers of rows are powers of 2.
FEWEST_ROWS = 16
# One stage computes during the loads of the others: up to 72 KiB, of the 99 KiB that Ada allows a thread block.
STAGES, WARPS = 4, 4

# Activations that Triton lowers, besides `ClampedSwiglu`: not `erfc` (exact gelu).
KERNEL_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh", "relu")


class Weights(NamedTuple):
    """Matrices of all experts, and rows of all experts that products are multiplied by and added to; in a kernel,
    references to them.

    Fields:
        values: matrices `[all, in, out]`, 16-bit floats or int8; codes of MXFP4, `[all, in / 2, out]`.
        exponents: of MXFP4, `[all, in / 32, out]`; None for others.
        scale: scales of int8 values, `[all, 1, out]`; None for others.
        bias: biases, `[all, 1, out]`, or None.
    """

    values: Array
    exponents: Array | None
    scale: Array | None
    bias: Array | None

    @property
    def inner(self) -> int:
        """Number of inputs."""
        return self.values.shape[1] * (1 if self.exponents is None else 2)


def _weights(matrix: Matrix, bias: Array | None) -> Weights:
    if isinstance(matrix, Mxfp4):
        return Weights(matrix.codes, matrix.exponents, None, bias)
    if isinstance(matrix, Quantized):
        return Weights(matrix.values, None, matrix.scale, bias)
    return Weights(matrix, None, None, bias)


def triton_experts(activation: Activation) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout for NVIDIA GPUs (`gpu.kernel_experts`)."""
    return kernel_experts(activation, missing, slot_outputs)


def missing(activation: Activation, experts: Flat, dtype: DTypeLike) -> str | None:
    """Name what the kernels do not support: besides `gpu.unsupported`, some activations."""
    if not isinstance(activation, ClampedSwiglu) and activation not in KERNEL_ACTIVATIONS:
        return f"the activation {activation}"
    gate = _weights(experts.gate, None)
    return unsupported(gate.values.dtype, (gate.inner, gate.values.shape[2]), dtype, TILE)


def supported(device: object) -> bool:
    """Test whether a device is an NVIDIA GPU of Ampere or later; older ones do not multiply bfloat16."""
    # AMD's compute capabilities are names, not numbers.
    return re.fullmatch(r"([89]|\d\d)\.\d", getattr(device, "compute_capability", None) or "") is not None


def slot_outputs(
    activation: Activation,
    x: Float[Array, "*slots tokens model"],
    experts: Flat,
    first: Int[Array, ""],
    ids: Int[Array, " slots"],
    *,
    interpret: bool = False,
) -> Float[Array, "slots tokens model"]:
    """Run tokens through the expert of every slot, float32; the output of slots without an expert is undefined.

    Args:
        activation: name of the activation.
        x: tokens of every slot, or, with two axes, tokens that all slots share.
        experts: matrices of all experts of all sparse layers.
        first: index of the layer's first expert in the matrices.
        ids: expert of every slot, counted from the layer's first; `num_experts` where there is none.
        interpret: whether to interpret the kernels, on any platform.
    """
    gate, up = _weights(experts.gate, experts.gate_bias), _weights(experts.up, experts.up_bias)
    down = _weights(experts.down, experts.down_bias)
    run = partial(_multiply, ids=ids, first=first[None], num_experts=experts.num_experts, interpret=interpret)
    height = max(FEWEST_ROWS, pl.next_power_of_2(x.shape[-2]))
    hidden = run(partial(gated, activation), x, (gate, up), kept=height, dtype=x.dtype)
    return run(lambda y: y, hidden, (down,), kept=x.shape[-2], dtype=jnp.float32)


def _multiply(
    finish: Callable[..., Array],
    x: Float[Array, "*slots rows inner"],
    weights: tuple[Weights, ...],
    *,
    ids: Int[Array, " slots"],
    first: Int[Array, "1"],
    num_experts: int,
    kept: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> Float[Array, "slots kept columns"]:
    """Compute `finish` of the products of `x` with every slot's matrices, one launch.

    Args:
        finish: elementwise function of one float32 product for each of `weights`.
        x: rows of every slot, or, with two axes, rows that all slots share.
        weights: matrices of all experts, with their scales and biases.
        ids: expert of every slot.
        first: index in the matrices of the expert of id 0.
        num_experts: ids from here on stand for none; the output of their slots is undefined.
        kept: number of rows to write; those beyond the rows of `x` are of rows of 0.
        dtype: dtype of the output.
        interpret: whether to interpret the kernel.
    """
    slots, given, columns = ids.shape[0], x.shape[-2], weights[0].values.shape[2]
    arrays, structure = jax.tree.flatten(weights)
    height = max(FEWEST_ROWS, pl.next_power_of_2(given))

    def block(ids, first, x, *references):
        *references, out = references
        weights: tuple[Weights, ...] = structure.unflatten(references)
        # Neighbours in the first grid axis run at the same time, on neighbouring columns of the same rows.
        across, slot = pl.ds(pl.program_id(0) * TILE, TILE), pl.program_id(1)
        row = jnp.arange(height, dtype=jnp.int32)[:, None]

        @pl.when(ids[slot] < num_experts)
        def _():
            expert = first[0] + ids[slot]

            def tokens(inputs):
                # Indices take the mask in their own shape.
                above, shape = (
                    (row, (height, TILE // 2)) if isinstance(inputs, Array) else (pl.ds(0, height), row.shape)
                )
                rows = x.at[slot, above, inputs] if x.ndim == 3 else x.at[above, inputs]
                if given == height:
                    return plgpu.load(rows)
                return plgpu.load(rows, mask=jnp.broadcast_to(row < given, shape), other=0.0)

            def step(k, sums):
                left = [tokens(inputs) for inputs in _inputs(weights[0], k)]
                return tuple(
                    total + _product(left, of, expert, k, across) for total, of in zip(sums, weights, strict=True)
                )

            sums = (jnp.zeros((height, TILE), jnp.float32),) * len(weights)
            sums = jax.lax.fori_loop(0, weights[0].inner // TILE, step, sums)
            sums = (_scaled(total, of, expert, across) for total, of in zip(sums, weights, strict=True))
            result = finish(*sums).astype(dtype)
            target = out.at[slot, pl.ds(0, height), across]
            plgpu.store(target, result, mask=None if kept == height else row < kept)

    # Without block specs the kernel gets references to whole arrays, and loads only the parts that it indexes.
    return pl.pallas_call(
        block,
        grid=(columns // TILE, slots),
        out_shape=jax.ShapeDtypeStruct((slots, kept, columns), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="experts_down" if len(weights) == 1 else "experts_gate_up",
    )(ids, first, x, *arrays)


def _inputs(of: Weights, k: Array) -> list[Slice] | list[Int[Array, "1 inputs"]]:
    """List the inputs of step k: those of every row of a tile; of MXFP4, those of low and those of high codes."""
    if of.exponents is None:
        return [pl.ds(k * TILE, TILE)]
    pair = jnp.arange(TILE // 2, dtype=jnp.int32)[None]
    low = k * TILE + pair + pair // (BLOCK // 2) * (BLOCK // 2)
    return [low, low + BLOCK // 2]


def _product(left: list[Array], of: Weights, expert: Array, k: Array, across: Slice) -> Array:
    """Multiply the inputs of step k by the rows of their tile."""
    dtype = left[0].dtype
    if of.exponents is None:
        # int8 is exact in both 16-bit dtypes.
        tiles = [of.values[expert, pl.ds(k * TILE, TILE), across].astype(dtype)]
    else:
        codes = of.values[expert, pl.ds(k * (TILE // 2), TILE // 2), across]
        # The exponent of every code, loaded as often as there are codes: a block has 16 pairs.
        block = k * (TILE // BLOCK) + jnp.arange(TILE // 2, dtype=jnp.int32)[:, None] // (BLOCK // 2)
        column = across.start + jnp.arange(TILE, dtype=jnp.int32)[None]
        scales = powers_of_two(of.exponents[expert, block, column])
        tiles = [(e2m1(half) * scales).astype(dtype) for half in (codes & 15, codes >> 4)]
    products = [jnp.dot(rows, tile, preferred_element_type=jnp.float32) for rows, tile in zip(left, tiles, strict=True)]
    return products[0] if len(products) == 1 else products[0] + products[1]


def _scaled(total: Array, of: Weights, expert: Array, across: Slice) -> Array:
    """Multiply products by the scales of their columns, and add the bias."""
    total = total if of.scale is None else total * of.scale[expert, :, across]
    return total if of.bias is None else total + of.bias[expert, :, across].astype(jnp.float32)
