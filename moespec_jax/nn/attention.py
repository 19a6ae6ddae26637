"""Grouped-query attention under an explicit mask, and masks of causal decoding, draft trees and sliding windows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import AttentionConfig, OutputGate, QueryScale
from moespec_jax.nn.cache import write_rows
from moespec_jax.nn.layers import apply_rope, rms_norm
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import psum
from moespec_jax.parallel.mesh import Axes


@struct.dataclass
class Attention:
    """Projection weights of one layer; stacked layers have a leading axis.

    `inputs` is the width of the residual stream (`model`), and twice that in the first layer of a draft head.

    Fields:
        q, k, v: `[out, in]`, as published: the TPU compiler copies a stack in the other order once per call.
        o: `[in, out]`.
        q_bias, k_bias, v_bias, o_bias: None where the family has none.
        q_norm, k_norm: RMS norm weights, over each head or over all heads (`qk_norm`); None where there is none.
        sinks: score of every head's sink; None where the family has none.
        output_gate: projection to the gates of the heads' outputs, `[out, in]`; None where the family has none.
    """

    q: Float[Array, "*stack q_out inputs"]
    k: Float[Array, "*stack kv_out inputs"]
    v: Float[Array, "*stack kv_out inputs"]
    o: Float[Array, "*stack q_out model"]
    q_bias: Float[Array, "*stack q_out"] | None = None
    k_bias: Float[Array, "*stack kv_out"] | None = None
    v_bias: Float[Array, "*stack kv_out"] | None = None
    o_bias: Float[Array, "*stack model"] | None = None
    q_norm: Float[Array, "*stack q_norm"] | None = None
    k_norm: Float[Array, "*stack k_norm"] | None = None
    sinks: Float[Array, "*stack heads"] | None = None
    output_gate: Float[Array, "*stack gates inputs"] | None = None

    __repr__ = summary


def project_qkv(
    config: AttentionConfig,
    weights: Attention,
    x: Float[Array, "batch tokens inputs"],
    cos: Float[Array, "batch tokens half"],
    sin: Float[Array, "batch tokens half"],
    axes: Axes = (),
) -> tuple[
    Float[Array, "batch tokens heads head"],
    Float[Array, "batch tokens kv_heads head"],
    Float[Array, "batch tokens kv_heads head"],
]:
    """Compute rotated queries, rotated keys and values; where heads are sharded over `axes`, those of this device.

    Order as published: project, norm over all heads (OLMoE), clip, split into heads, norm per head (Qwen3), rotate,
    norm per rotated head (HunYuan, Llama-4).
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
    q, k = (apply_rope(part, cos, sin, config.rope.interleaved) for part in parts[:2])
    if config.qk_norm in ("rotated", "unit"):
        one = jnp.ones(config.head_dim, x.dtype)
        norms = (one if norm is None else norm for norm in (weights.q_norm, weights.k_norm))
        q, k = (rms_norm(y, norm, config.rms_norm_eps) for y, norm in zip((q, k), norms, strict=True))
    return q, k, parts[2]


def gate_output(
    mixed: Float[Array, "batch tokens q_out"],
    weight: Float[Array, "gates inputs"],
    x: Float[Array, "batch tokens inputs"],
    kind: OutputGate,
) -> Float[Array, "batch tokens q_out"]:
    """Multiply the heads' outputs by a sigmoid or softplus (in float32) of a projection of the layer's input, one gate
    for each number or for each head."""
    gates = jnp.einsum("btm,om->bto", x, weight)
    if kind == "softplus":
        gates = jax.nn.softplus(gates.astype(jnp.float32)).astype(mixed.dtype)
    else:
        gates = jax.nn.sigmoid(gates)
    gated = mixed.reshape(*gates.shape, -1) * gates[..., None]
    return gated.reshape(mixed.shape)


def _barrier_on_tpu(x: Array) -> Array:
    """Return `x`. Without the barrier, the TPU compiler splits the weight into heads instead of the product, and
    copies the weight."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def attend(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "batch kv_heads slots head"],
    v: Float[Array, "batch kv_heads slots head"],
    mask: Bool[Array, "batch tokens slots"],
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch tokens q_out"]:
    """Compute softmax(q kᵀ / √head) v, with scores and softmax in float32; each group of `heads / kv_heads` query
    heads shares one key/value head. The softmax of a head with a sink includes the sink's score.

    A row whose mask is false everywhere (a padding token) averages over all slots, or is 0 with sinks: a finite result
    that is never read.
    """
    batch, tokens, heads, head = q.shape
    groups = k.shape[1]
    # As one batch of matrix products: from an einsum over all axes, XLA:CPU transposes the whole cache in every step.
    grouped = q.reshape(batch, tokens, groups, heads // groups, head).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, groups, -1, head)
    scores = jnp.einsum("bgqh,bgsh->bgqs", grouped, k, preferred_element_type=jnp.float32) * head**-0.5
    scores = scores.reshape(batch, groups, heads // groups, tokens, -1)
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1) if sinks is None else _softmax_with_sinks(scores, sinks)
    weights = weights.astype(v.dtype).reshape(batch, groups, grouped.shape[2], -1)
    mixed = jnp.einsum("bgqs,bgsh->bgqh", weights, v).reshape(batch, groups, heads // groups, tokens, head)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head)


def _softmax_with_sinks(
    scores: Float[Array, "batch kv_heads group tokens slots"], sinks: Float[Array, " heads"]
) -> Float[Array, "batch kv_heads group tokens slots"]:
    """Compute the softmax over slots and each head's sink, without the sink's share."""
    sink = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    shares = jnp.exp(scores - peak)
    return shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(sink - peak))


# Attention over one layer of a cache; signature of `attend_layer` without sinks.
LayerAttention = Callable[[Array, Array, Array, "Array | None", Array], Array]


def attend_layer(
    q: Float[Array, "batch tokens heads head"],
    k: Float[Array, "*layers batch kv_heads slots head"],
    v: Float[Array, "*layers batch kv_heads slots head"],
    layer: Int[Array, ""] | None,
    mask: Bool[Array, "batch tokens slots"],
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch tokens q_out"]:
    """Apply `attend` to one layer of a stacked cache, or, without `layer`, to the cache of a layer."""
    return attend(q, k, v, mask, sinks) if layer is None else attend(q, k[layer], v[layer], mask, sinks)


def write_qkv(
    config: AttentionConfig,
    weights: Attention,
    x: Float[Array, "batch tokens inputs"],
    angles: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    kv: tuple[Float[Array, "*layers batch kv_heads slots head"], Float[Array, "*layers batch kv_heads slots head"]],
    start: Int[Array, " batch"],
    layer: Int[Array, ""] | None = None,
    axes: Axes = (),
) -> tuple[Array, tuple[Array, Array]]:
    """Compute rotated queries, and write rotated keys and values from slot `start[b]` on into a cache (`write_rows`).

    `angles` are cosine and sine.
    """
    q, k, v = project_qkv(config, weights, x, *angles, axes)
    return q, (write_rows(kv[0], k, start, layer), write_rows(kv[1], v, start, layer))


# `write_qkv`, or a function of its signature.
WriteQkv = Callable[..., tuple[Array, tuple[Array, Array]]]


def output_projection(
    weights: Attention, x: Float[Array, "batch tokens q_out"], axes: Axes = ()
) -> Float[Array, "batch tokens model"]:
    """Project the heads' outputs to the residual stream, summed over the shards of the heads."""
    y = psum(x @ weights.o, axes)
    return y if weights.o_bias is None else y + weights.o_bias[None, None, :]


# `output_projection`, or a function of its signature.
OutputProjection = Callable[[Attention, Array, Axes], Array]


def causal_mask(positions: Int[Array, "batch tokens"], slots: int) -> Bool[Array, "batch tokens slots"]:
    """Build the mask of causal attention, true where slot <= position: the token at position p is in slot p."""
    return jnp.arange(slots, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]


def tree_mask(
    ancestors: Bool[Array, "batch tokens nodes"], start: Int[Array, " batch"], slots: int
) -> Bool[Array, "batch tokens slots"]:
    """Build the mask of tree attention, true at every slot before `start[b]`, and at slot `start[b] + i` where
    `ancestors[b, t, i]`."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :] - start[:, None]
    own = jax.lax.platform_dependent(ancestors, slot, cuda=_ancestor_slots_by_index, default=_ancestor_slots)
    return (slot < 0)[:, None, :] | own


def _ancestor_slots(ancestors: Array, slot: Array) -> Array:
    # A product with a one-hot matrix: indexing `ancestors` by slot would be a gather, which is slow on TPUs.
    node_slots = jax.nn.one_hot(slot, ancestors.shape[-1], axis=1, dtype=jnp.float32)
    return jnp.einsum("btn,bns->bts", ancestors.astype(jnp.float32), node_slots) > 0


def _ancestor_slots_by_index(ancestors: Array, slot: Array) -> Array:
    """Compute the same as a gather, which is one launch."""
    node, nodes = slot[:, None, :], ancestors.shape[-1]
    return jnp.take_along_axis(ancestors, jnp.clip(node, 0, nodes - 1), axis=2) & (node >= 0) & (node < nodes)


def within_chunk(
    positions: Int[Array, "batch tokens"], slot_positions: Int[Array, "batch slots"], chunk: int | Array
) -> Bool[Array, "batch tokens slots"]:
    """Build the mask of chunked attention, true where a slot's token is in the same chunk of so many positions; a chunk
    of 0 masks nothing."""
    size = jnp.maximum(jnp.asarray(chunk, jnp.int32), 1)
    return (positions[:, :, None] // size == slot_positions[:, None, :] // size) | (jnp.asarray(chunk) == 0)


def query_factor(form: QueryScale, positions: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens"]:
    """Compute the factor on the query of every token, float32."""
    return 1.0 + form.scale * jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1.0) / form.step))


def within_window(
    positions: Int[Array, "batch tokens"], slot_positions: Int[Array, "batch slots"], window: int | Array
) -> Bool[Array, "batch tokens slots"]:
    """Build the mask of sliding-window attention, true where a slot's token is less than `window` positions back; a
    window of 0 masks nothing."""
    distance = positions[:, :, None] - slot_positions[:, None, :]
    return (distance < window) | (jnp.asarray(window) == 0)
