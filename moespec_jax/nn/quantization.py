"""Weight-only int8 quantization, symmetric, with one scale for each output channel: half the bytes of bfloat16.

Weights w of a channel are stored as q = round(w / s), with scale s = max |w| / 127. Products are summed over q and
then multiplied by s, so that a wider copy of a matrix exists only inside a kernel.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int8

from moespec_jax.nn.summary import summary

Quantization = Literal["int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8",)


@struct.dataclass
class Quantized:
    """Quantized matrices, stored `[in, out]`; `values * scale` approximates them.

    Fields:
        values: integers from -127 to 127.
        scale: scale of each output channel, stored as a row: where a loop over layers reshapes scales to rows, the TPU
            compiler copies those of all layers in every iteration.
    """

    values: Int8[Array, "*stack in out"]
    scale: Float[Array, "*stack 1 out"]

    __repr__ = summary


# Matrices that may be quantized.
Matrix = Array | Quantized


def quantize_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix `[out, in]`, as published: int8 values, and a float32 scale for each row.

    Raises:
        ValueError: a weight is not finite.
    """
    wide = matrix.astype(np.float32)
    scale = np.abs(wide).max(axis=1) / np.float32(127)
    if not np.isfinite(scale).all():
        raise ValueError("it holds NaN or infinity")
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return np.rint(wide / scale[:, None]).astype(np.int8), scale


def row_of(matrices: Matrix, row: Array) -> Matrix:
    """Index one matrix of a stack; the compiler fuses the index into the load."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, axis=0, keepdims=False), matrices)


def product(x: Float[Array, "tokens in"], matrix: Matrix) -> Float[Array, "tokens out"]:
    """Compute `x @ matrix`, accumulated in float32."""
    if isinstance(matrix, Quantized):
        return product(x, matrix.values.astype(x.dtype)) * matrix.scale
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32)


def widened(matrices: Matrix, dtype: jnp.dtype) -> Array:
    """Dequantize matrices to `dtype`, for reference implementations; others are returned as they are."""
    if not isinstance(matrices, Quantized):
        return matrices
    return (matrices.values.astype(jnp.float32) * matrices.scale).astype(dtype)
