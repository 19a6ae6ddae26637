"""Grouped-query attention under an explicit mask. Knows neither "causal" nor "tree": whoever calls decides."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import AttentionConfig
from moespec_jax.nn.layers import apply_rope, rms_norm
from moespec_jax.parallel.collectives import psum
from moespec_jax.parallel.mesh import Axes


@struct.dataclass
class Attention:
    """Projection weights. q, k, v are `[out, in]` as published: stacked over layers in any other order, the TPU
    compiler copies them once per call. o is `[in, out]`. Biases and norms are None where the family has none."""

    q: Float[Array, "q_out model"]
    k: Float[Array, "kv_out model"]
    v: Float[Array, "kv_out model"]
    o: Float[Array, "q_out model"]
    q_bias: Float[Array, " q_out"] | None = None
    k_bias: Float[Array, " kv_out"] | None = None
    v_bias: Float[Array, " kv_out"] | None = None
    o_bias: Float[Array, " model"] | None = None
    q_norm: Float[Array, " norm"] | None = None
    k_norm: Float[Array, " norm"] | None = None


def project_qkv(
    config: AttentionConfig,
    weights: Attention,
    x: Float[Array, "batch tokens model"],
    cos: Array,
    sin: Array,
    axes: Axes = (),
) -> tuple[Array, Array, Array]:
    """Rotated queries `[batch, tokens, heads, head]`, rotated keys and plain values `[batch, tokens, kv_heads, head]`.
    Where heads are split over `axes` of a mesh, this device's.

    Order as published: project, norm over all heads (OLMoE), clip, split into heads, norm per head (Qwen3), rotate.
    """
    parts = []
    for weight, bias, norm in (
        (weights.q, weights.q_bias, weights.q_norm),
        (weights.k, weights.k_bias, weights.k_norm),
        (weights.v, weights.v_bias, None),
    ):
        y = _barrier_on_tpu(jnp.einsum("btm,om->bto", x, weight))
        if bias is not None:
            y = y + bias[None, None, :]
        if norm is not None and config.qk_norm == "flat":
            y = rms_norm(y, norm, config.rms_norm_eps, axes)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        y = y.reshape(*y.shape[:2], -1, config.head_dim)
        if norm is not None and config.qk_norm == "head":
            y = rms_norm(y, norm, config.rms_norm_eps)
        parts.append(y)
    q, k, v = parts
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def _barrier_on_tpu(x: Array) -> Array:
    """The same. Left alone, the TPU compiler splits the weight into heads instead of the product, and copies it."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def attend(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "batch kv_heads slots head"],
    v: Float[Array, "batch kv_heads slots head"],
    mask: Bool[Array, "batch tokens slots"],
) -> Float[Array, "batch tokens q_out"]:
    """Softmax attention in float32; each group of `heads / kv_heads` queries shares one key/value head.

    A row that sees nothing (a padding token) averages over all slots, which is finite and never read.
    """
    batch, tokens, heads, head = q.shape
    groups = k.shape[1]
    # One batch of plain matrix products: left to itself, XLA:CPU transposes the whole cache for every step.
    grouped = q.reshape(batch, tokens, groups, heads // groups, head).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, groups, -1, head)
    scores = jnp.einsum("bgqh,bgsh->bgqs", grouped, k, preferred_element_type=jnp.float32) * head**-0.5
    scores = scores.reshape(batch, groups, heads // groups, tokens, -1)
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, groups, grouped.shape[2], -1)
    mixed = jnp.einsum("bgqs,bgsh->bgqh", weights, v).reshape(batch, groups, heads // groups, tokens, head)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head)


# Attends over one layer of a stacked cache, with `attend_layer`'s signature.
LayerAttention = Callable[[Array, Array, Array, Array, Array], Array]


def attend_layer(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "layers batch kv_heads slots head"],
    v: Float[Array, "layers batch kv_heads slots head"],
    layer: Int[Array, ""],
    mask: Bool[Array, "batch tokens slots"],
) -> Float[Array, "batch tokens q_out"]:
    """`attend` over one layer of the cache of all."""
    return attend(q, k[layer], v[layer], mask)


def output_projection(
    weights: Attention, x: Float[Array, "batch tokens q_out"], axes: Axes = ()
) -> Float[Array, "batch tokens model"]:
    """Mix the heads back into the residual stream; all of them, where they are split over `axes` of a mesh."""
    y = psum(x @ weights.o, axes)
    return y if weights.o_bias is None else y + weights.o_bias[None, None, :]


def causal_mask(positions: Int[Array, "batch tokens"], slots: int) -> Bool[Array, "batch tokens slots"]:
    """True where slot <= position: the mask of ordinary decoding, whose token at position p lives in slot p."""
    return jnp.arange(slots, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]


def tree_mask(
    own: Bool[Array, "batch tokens nodes"], start: Int[Array, " batch"], slots: int
) -> Bool[Array, "batch tokens slots"]:
    """True for every slot before `start[b]`, and for slot `start[b] + i` where `own[b, t, i]`."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :] - start[:, None]
    # A product with a one-hot matrix: indexing `own` by slot would be a gather, which is slow on accelerators.
    place = jax.nn.one_hot(slot, own.shape[-1], axis=1, dtype=jnp.float32)
    seen = jnp.einsum("btn,bns->bts", own.astype(jnp.float32), place)
    return (slot < 0)[:, None, :] | (seen > 0)


def within_window(
    positions: Int[Array, "batch tokens"], slot_positions: Int[Array, "batch slots"], window: int | Array
) -> Bool[Array, "batch tokens slots"]:
    """True where a slot's token is less than `window` positions back; a window of 0 hides nothing."""
    distance = positions[:, :, None] - slot_positions[:, None, :]
    return (distance < window) | (jnp.asarray(window) == 0)
