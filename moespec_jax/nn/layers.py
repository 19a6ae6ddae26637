"""Layers that all decoders share: RMS norm, rotary position embedding (RoPE) and gated MLP."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from moespec_jax.config import Activation, ClampedSwiglu, RopeConfig
from moespec_jax.nn.quantization import Matrix, Mxfp4, Quantized, product, widened
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import pmean
from moespec_jax.parallel.mesh import Axes

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@struct.dataclass
class GatedMlp:
    """Weights of `down(act(gate(x)) * up(x))`, stored `[in, out]`; stacked layers have a leading axis. Biases are rows;
    they are None where there are none."""

    gate: Float[Array, "*stack model ffn"] | Quantized | Mxfp4
    up: Float[Array, "*stack model ffn"] | Quantized | Mxfp4
    down: Float[Array, "*stack ffn model"] | Quantized | Mxfp4
    gate_bias: Float[Array, "*stack 1 ffn"] | None = None
    up_bias: Float[Array, "*stack 1 ffn"] | None = None
    down_bias: Float[Array, "*stack 1 model"] | None = None

    __repr__ = summary


def rms_norm(
    x: Float[Array, "*batch model"], weight: Float[Array, " model"], eps: float, axes: Axes = ()
) -> Float[Array, "*batch model"]:
    """Compute x / √(mean(x²) + eps) · weight (RMS norm, arXiv:1910.07467): the mean and the quotient in float32, the
    product with `weight` in the dtype of `x`. Where `model` is sharded over `axes`, the mean is that of all shards."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(pmean(jnp.mean(wide * wide, axis=-1, keepdims=True), axes) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


@struct.dataclass
class LayerNorm:
    """Parameters of a norm that subtracts the mean; stacked layers have a leading axis."""

    weight: Float[Array, "*stack model"]
    bias: Float[Array, "*stack model"]

    __repr__ = summary


# Parameters of a norm of the residual stream: the weight of an RMS norm, a `LayerNorm`, or None where there is no norm.
Norm = Float[Array, "*stack model"] | LayerNorm | None


def apply_norm(x: Float[Array, "*batch model"], norm: Norm, eps: float) -> Float[Array, "*batch model"]:
    """Compute the norm of these parameters; without any, return `x`."""
    if norm is None:
        return x
    return layer_norm(x, norm, eps) if isinstance(norm, LayerNorm) else rms_norm(x, norm, eps)


def layer_norm(x: Float[Array, "*batch model"], norm: LayerNorm, eps: float) -> Float[Array, "*batch model"]:
    """Compute (x - mean(x)) / √(var(x) + eps) · weight + bias (LayerNorm, arXiv:1607.06450), in float32."""
    wide, shape = x.astype(jnp.float32), (1,) * (x.ndim - 1) + norm.weight.shape
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight, bias = (part.astype(jnp.float32).reshape(shape) for part in (norm.weight, norm.bias))
    return (wide * weight + bias).astype(x.dtype)


def norm_weight(norm: Norm) -> Array:
    """Return the weight of a norm."""
    assert norm is not None
    return norm.weight if isinstance(norm, LayerNorm) else norm


def add_norm(
    x: Float[Array, "*batch model"], y: Float[Array, "*batch model"] | None, norm: Norm, eps: float
) -> tuple[Float[Array, "*batch model"], Float[Array, "*batch model"]]:
    """Compute x + y, or x without `y`, and its norm (`apply_norm`)."""
    x = x if y is None else x + y
    return x, apply_norm(x, norm, eps)


# `add_norm`, or a function of its signature.
AddNorm = Callable[[Array, "Array | None", Norm, float], tuple[Array, Array]]


def gated_mlp(x: Float[Array, "tokens model"], mlp: GatedMlp, activation: Activation) -> Float[Array, "tokens model"]:
    """Compute `down(act(gate(x)) * up(x))`: SwiGLU (arXiv:2002.05202) where `activation` is silu."""

    quantized = any(isinstance(matrix, Quantized) for matrix in (mlp.gate, mlp.up, mlp.down))

    def times(rows: Array, matrix: Matrix, bias: Array | None) -> Array:
        if isinstance(matrix, Mxfp4):  # the numbers of plain matrices: rounded as they are
            matrix = widened(matrix, rows.dtype)
        whole = product(rows, matrix) if quantized or isinstance(matrix, Quantized) else rows @ matrix
        return add_bias(whole, bias)

    hidden = gated(activation, times(x, mlp.gate, mlp.gate_bias), times(x, mlp.up, mlp.up_bias))
    return times(hidden.astype(x.dtype), mlp.down, mlp.down_bias).astype(x.dtype)


def gated(activation: Activation, gate: Float[Array, "*rows ffn"], up: Float[Array, "*rows ffn"]) -> Array:
    """Compute `act(gate) * up`, or a `ClampedSwiglu`."""
    if not isinstance(activation, ClampedSwiglu):
        return ACTIVATIONS[activation](gate) * up
    limit = activation.limit
    gate, up = jnp.minimum(gate, limit), jnp.maximum(jnp.minimum(up, limit), -limit)
    return (up + 1) * (gate * jax.nn.sigmoid(activation.alpha * gate))


def add_bias(products: Float[Array, "*rows out"], bias: Float[Array, "1 out"] | None) -> Float[Array, "*rows out"]:
    """Add a bias, a row, in the dtype of `products`; without one, return `products`."""
    return products if bias is None else products + bias.astype(products.dtype)


def apply_rope(
    x: Float[Array, "batch tokens heads head"],
    cos: Float[Array, "batch tokens half"],
    sin: Float[Array, "batch tokens half"],
    interleaved: bool = False,
) -> Float[Array, "batch tokens heads head"]:
    """Rotate pairs of each head, in the dtype of `x` (RoPE, arXiv:2104.09864): of its first 2 * half dimensions,
    (x_i, x_{i + half}), or, interleaved, (x_{2i}, x_{2i + 1}), whose results are in the order of the former: products
    of queries and keys do not depend on it."""
    width = 2 * cos.shape[-1]
    rest = [x[..., width:]] if width < x.shape[-1] else []
    x = x[..., :width] if rest else x
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    c, s = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    return jnp.concatenate([a * c - b * s, b * c + a * s, *rest], axis=-1)


def rope_angles(
    rope: RopeConfig,
    head_dim: int,
    max_position_embeddings: int,
    positions: Int[Array, "batch tokens"],
    length: Int[Array, ""] | Int[Array, "batch tokens"],
) -> tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]]:
    """Compute cosine and sine of the angles of every position, float32, for the rotated part of a head.

    `length` is the sequence length in tokens for `dynamic` scaling, whose base depends on it: that of the longest
    sequence, as in transformers, or one for each row. With one for each row, the angles of a sequence do not depend on
    the rest of the batch, and those of a node, which replaces a forward pass of plain decoding, not on its tree.
    """
    head_dim = rope.rotary_dim(head_dim)
    if rope.rope_type == "dynamic":
        inverse = _dynamic_frequencies(rope, head_dim, max_position_embeddings, length)
        scale = 1.0
    else:
        inverse, scale = rope_frequencies(rope, head_dim, max_position_embeddings)
    inverse = jnp.asarray(inverse).reshape((1,) * (3 - inverse.ndim) + inverse.shape)
    angles = positions[:, :, None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rope_frequencies(rope: RopeConfig, head_dim: int, max_position_embeddings: int) -> tuple[np.ndarray, float]:
    """Compute the angular frequencies θ^(-2i / head_dim), `[head_dim / 2]` float32, under a static scaling, and the
    factor on cosine and sine."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.float32(rope.rope_theta) ** exponents).astype(np.float32)
    if rope.rope_type == "linear":
        return inverse / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, inverse, max_position_embeddings), 1.0
    if rope.rope_type == "longrope":  # within the original context, which is all that `context_length` allows
        return inverse / np.asarray(rope.short_factor, np.float32), rope.short_mscale
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, head_dim, inverse, max_position_embeddings)
    return inverse, 1.0


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, max_position_embeddings: int, length: Array) -> Array:
    """Compute frequencies of dynamic NTK scaling, whose base grows with the sequence beyond the trained context."""
    length = jnp.maximum(length, max_position_embeddings).astype(jnp.float32)
    stretch = rope.factor * length / max_position_embeddings - (rope.factor - 1.0)
    base = rope.rope_theta * stretch ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / base[..., None] ** exponents.reshape((1,) * base.ndim + exponents.shape)


def _llama3_frequencies(rope: RopeConfig, inverse: np.ndarray, max_position_embeddings: int) -> np.ndarray:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between (Llama 3.1)."""
    context = rope.original_max_position_embeddings or max_position_embeddings
    wavelength = 2 * np.pi / inverse
    low, high = context / rope.low_freq_factor, context / rope.high_freq_factor
    span = (rope.high_freq_factor - rope.low_freq_factor) or 1.0  # without one, no frequency is between (Llama-4-Scout)
    smooth = (context / wavelength - rope.low_freq_factor) / span
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = np.where(wavelength > low, inverse / rope.factor, inverse)
    return np.where((wavelength <= low) & (wavelength >= high), between, scaled).astype(np.float32)


def _yarn_frequencies(
    rope: RopeConfig, head_dim: int, inverse: np.ndarray, max_position_embeddings: int
) -> tuple[np.ndarray, float]:
    """Compute frequencies and attention factor of YaRN (arXiv:2309.00071): low frequencies are divided by `factor`,
    high ones kept, with a linear ramp between."""
    context = rope.original_max_position_embeddings or max_position_embeddings

    def dimension(rotations: float) -> float:
        """Compute the (fractional) dimension of the frequency that rotates so often over the trained context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    scaled = inverse / np.float32(rope.factor) * ramp + inverse * (1 - ramp)
    return scaled.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
