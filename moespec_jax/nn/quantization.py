"""int8 weights: each output channel of a matrix as whole numbers of a step of its own, which halves the bytes of bf16.

The step is the largest weight of the channel over 127 (symmetric, rounded to nearest). Products multiply by the step
after they are summed, so that the matrix itself is never there in a wider type but in what a kernel works on.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int8

Quantization = Literal["int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8",)


@struct.dataclass
class Quantized:
    """Matrices `[..., in, out]` as int8, with a float32 step for each output channel, kept as one row: reshaped to one
    inside a loop over layers, all of them would be copied in every layer on TPU."""

    values: Int8[Array, "*stack in out"]
    scale: Float[Array, "*stack 1 out"]


# Matrices that may be quantized.
Matrix = Array | Quantized


def quantize_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[out, in]`, as published, in whole numbers from -127 to 127, and the step of each row, float32.

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
    """One matrix of a stack, indexed inside the load."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, axis=0, keepdims=False), matrices)


def product(x: Float[Array, "tokens in"], matrix: Matrix) -> Float[Array, "tokens out"]:
    """`x @ matrix`, summed in float32."""
    if isinstance(matrix, Quantized):
        return product(x, matrix.values.astype(x.dtype)) * matrix.scale
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32)


def widened(matrices: Matrix, dtype: jnp.dtype) -> Array:
    """The matrices themselves: for references, which may copy."""
    if not isinstance(matrices, Quantized):
        return matrices
    return (matrices.values.astype(jnp.float32) * matrices.scale).astype(dtype)
