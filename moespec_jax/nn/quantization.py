"""Weight-only quantization of matrices, in two forms.

int8, symmetric, with one scale for each output channel: half the bytes of bfloat16. Weights w of a channel are stored
as q = round(w / s), with scale s = max |w| / 127. Products are summed over q and then multiplied by s, so that a wider
copy of a matrix exists only inside a kernel.

MXFP4 (OCP Microscaling Formats 1.0): floats of 4 bits (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) with a
power of two for every `BLOCK` inputs of an output channel: 0.27 of the bytes of bfloat16. A matrix is dequantized
where it is multiplied, into floats that are equal to those of the codes. Weights that a checkpoint has in MXFP4 are
kept exactly, but for those below 2^-126.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int8, UInt8

from moespec_jax.nn.summary import summary

Quantization = Literal["int8", "mxfp4"]
# Inputs that share a scale in MXFP4.
BLOCK = 32
# Rows of a matrix that are quantized at once.
_STRIP = 256


@struct.dataclass
class Quantized:
    """Matrices in int8, stored `[in, out]`; `values * scale` approximates them.

    Fields:
        values: integers from -127 to 127.
        scale: scale of each output channel, stored as a row: where a loop over layers reshapes scales to rows, the TPU
            compiler copies those of all layers in every iteration.
    """

    values: Int8[Array, "*stack in out"]
    scale: Float[Array, "*stack 1 out"]

    __repr__ = summary


@struct.dataclass
class Mxfp4:
    """Matrices in MXFP4, stored `[in, out]`.

    Fields:
        codes: two codes a byte, so that both halves of a block are contiguous: in the low bits rows 0 to 15 of each
            block, in the high bits rows 16 to 31.
        exponents: exponent of two of each block, plus 127 (e8m0).
    """

    codes: UInt8[Array, "*stack pairs out"]
    exponents: UInt8[Array, "*stack blocks out"]

    __repr__ = summary


# Matrices that may be quantized.
Matrix = Array | Quantized | Mxfp4


class Part(NamedTuple):
    """Array of a quantized matrix.

    Fields:
        suffix: what follows the name of the matrix in that of the array.
        inputs: inputs of the matrix for each row of the array; 0 stands for all.
        dtype: dtype of the array.
    """

    suffix: str
    inputs: int
    dtype: str


class Form(NamedTuple):
    """A form of quantized matrices.

    Fields:
        kind: class of the matrices, whose fields are the arrays.
        parts: description of its arrays.
        quantize: function from a matrix `[out, in]`, as published, to its arrays `[out, rows]`. It raises `ValueError`.
    """

    kind: Callable[..., Any]
    parts: tuple[Part, ...]
    quantize: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def quantize_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix `[out, in]`, as published: int8 values, and float32 scales `[out, 1]`.

    Raises:
        ValueError: a weight is not finite.
    """
    wide = matrix.astype(np.float32)
    scale = _finite(np.abs(wide).max(axis=1, keepdims=True)) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return np.rint(wide / scale).astype(np.int8), scale


def quantize_blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix `[out, in]`, as published, to MXFP4: codes `[out, in / 2]` and exponents `[out, in / 32]`.

    A block's scale is the power of two with which the exponent of its largest weight is that of 4, as OCP specifies;
    weights are rounded to the nearest code, larger ones than 6 to 6. In strips of rows, whose copies are small.

    Raises:
        ValueError: a weight is not finite.
    """
    rows, inputs = matrix.shape
    codes, exponents = np.empty((rows, inputs // 2), np.uint8), np.empty((rows, inputs // BLOCK), np.uint8)
    for start in range(0, rows, _STRIP):
        strip = slice(start, start + _STRIP)
        codes[strip], exponents[strip] = _quantize_strip(matrix[strip])
    return codes, exponents


def _quantize_strip(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    blocks = matrix.astype(np.float32).reshape(len(matrix), -1, BLOCK)
    _, exponents = np.frexp(_finite(np.abs(blocks).max(axis=2)))
    exponents = np.maximum(exponents - 3, -126)
    scaled = blocks * np.ldexp(np.float32(1), -exponents)[..., None]
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    pairs = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return pairs.reshape(len(matrix), -1), (exponents + 127).astype(np.uint8)


def _finite(largest: np.ndarray) -> np.ndarray:
    if not np.isfinite(largest).all():
        raise ValueError("it holds NaN or infinity")
    return largest


FORMS: dict[Quantization, Form] = {
    "int8": Form(Quantized, (Part("", 1, "int8"), Part("_scale", 0, "float32")), quantize_rows),
    "mxfp4": Form(Mxfp4, (Part("", 2, "uint8"), Part("_exponents", BLOCK, "uint8")), quantize_blocks),
}
QUANTIZATIONS: tuple[Quantization, ...] = tuple(FORMS)


def row_of(matrices: Matrix, row: Array) -> Matrix:
    """Index one matrix of a stack; the compiler fuses the index into the load."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, axis=0, keepdims=False), matrices)


def product(x: Float[Array, "tokens in"], matrix: Matrix) -> Float[Array, "tokens out"]:
    """Compute `x @ matrix`, accumulated in float32."""
    if isinstance(matrix, Quantized):
        return product(x, matrix.values.astype(x.dtype)) * matrix.scale
    if isinstance(matrix, Mxfp4):
        return jax.lax.platform_dependent(x, matrix, tpu=product_of_halves, default=_widened_product)
    return _widened_product(x, matrix)


def _widened_product(x: Array, matrix: Matrix) -> Array:
    return jnp.dot(x, widened(matrix, x.dtype), preferred_element_type=jnp.float32)


def product_of_halves(x: Float[Array, "tokens in"], matrix: Mxfp4) -> Float[Array, "tokens out"]:
    """Compute `product` as the sum of two, of the codes in low and in high bits: the TPU compiler decodes them inside
    the product, whereas it writes a matrix joined of both to memory."""
    blocks, out = matrix.exponents.shape
    inputs = x.reshape(len(x), blocks, 2, BLOCK // 2)
    scales = jnp.broadcast_to(powers_of_two(matrix.exponents)[:, None, :], (blocks, BLOCK // 2, out)).reshape(-1, out)

    def half(number: int, codes: Array) -> Array:
        return _widened_product(inputs[:, :, number].reshape(len(x), -1), (e2m1(codes) * scales).astype(x.dtype))

    return half(0, matrix.codes & 15) + half(1, matrix.codes >> 4)


def widened(matrices: Matrix, dtype: jnp.dtype) -> Array:
    """Dequantize matrices to `dtype`; others are returned as they are."""
    if isinstance(matrices, Quantized):
        return (matrices.values.astype(jnp.float32) * matrices.scale).astype(dtype)
    return _widened_blocks(matrices, dtype) if isinstance(matrices, Mxfp4) else matrices


def _widened_blocks(matrices: Mxfp4, dtype: jnp.dtype) -> Array:
    *stack, blocks, out = matrices.exponents.shape
    halves = matrices.codes.reshape(*stack, blocks, BLOCK // 2, out)
    numbers = e2m1(jnp.concatenate([halves & 15, halves >> 4], axis=-2))
    return (
        (numbers * powers_of_two(matrices.exponents)[..., None, :]).astype(dtype).reshape(*stack, blocks * BLOCK, out)
    )


def powers_of_two(exponents: UInt8[Array, "*any"]) -> Float[Array, "*any"]:
    """Compute powers of two: of a float32, the exponent without other bits."""
    return jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)


def e2m1(codes: UInt8[Array, "*any"]) -> Float[Array, "*any"]:
    """Compute the numbers of codes without a table, which accelerators read slowly: they are piecewise linear."""
    steps = (codes & 7).astype(jnp.float32)
    size = jnp.maximum(steps * 0.5, jnp.maximum(steps - 2, steps * 2 - 8))
    return jnp.where(codes > 7, -size, size)
