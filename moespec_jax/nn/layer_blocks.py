"""The two blocks of a transformer layer: attention, and a dense or sparse feed-forward block."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import (
    Attention,
    attend,
    attend_layer,
    gate_output,
    project_qkv,
    query_factor,
    within_chunk,
    within_window,
)
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.layers import GatedMlp, Norm, apply_norm, gated_mlp
from moespec_jax.nn.moe import ExpertCompute, Restrict, RouterInfo, SparseMlp, sparse_mlp
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import psum
from moespec_jax.parallel.mesh import ShardingPlan


@struct.dataclass
class Layer:
    """One transformer layer without its routed experts; stacked layers have a leading axis.

    Fields:
        input_norm: norm before attention; None where the family has none.
        attention: weights of attention.
        post_attention_norm: norm before the feed-forward block; None where the family has none.
        mlp: weights of that block.
        attention_output_norm, mlp_output_norm: norms of the blocks' outputs; None where the family has none.
    """

    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp: GatedMlp | SparseMlp
    attention_output_norm: Norm = None
    mlp_output_norm: Norm = None

    __repr__ = summary


# Cosine and sine, `[batch, tokens, half]`.
Angles = tuple[Array, Array]


class LayerForm(NamedTuple):
    """Settings of attention that one layer has of its own; numbers are traced where layers are scanned.

    Fields:
        window: attention window in tokens, 0 for none.
        chunk: tokens of a chunk, 0 for none.
        rope: index of its angles in those of the context.
        rotates: whether it has rotary embedding.
    """

    window: int | Array
    chunk: int | Array
    rope: int | Array
    rotates: bool | Array


class Context(NamedTuple):
    """Arguments that all layers of one forward pass share.

    Fields:
        positions: position of every token.
        slot_positions: position of the token in every cache slot.
        mask: whether a token attends to a slot.
        start: cache slot of each sequence's first token.
        angles: cosine and sine of every token's rotary embedding, for each kind of it.
        boundaries: layers whose entering hidden state is returned.
        compute: expert compute.
        backend: forms of the other parts of a layer.
        restrict: limit on each sparse layer's experts.
        sharding: how the parameters are sharded.
    """

    positions: Int[Array, "batch tokens"]
    slot_positions: Int[Array, "batch slots"]
    mask: Bool[Array, "batch tokens slots"]
    start: Int[Array, " batch"]
    angles: tuple[Angles, ...]
    boundaries: tuple[int, ...]
    compute: ExpertCompute
    backend: Backend
    restrict: Restrict | None
    sharding: ShardingPlan


def attention_block(
    config: DecoderConfig,
    layer: Layer,
    h: Array,
    context: Context,
    form: LayerForm,
    kv: tuple[Array, Array] | None,
    index: Array | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Compute attention of normed rows, and write the tokens' keys and values.

    `kv` is the cache of this layer, or, with `index`, of all layers, of which layer `index` is written and read.
    """
    weights, heads, mask, angles = layer.attention, context.sharding.heads, context.mask, _angles(context, form)
    if any(config.sliding_windows):
        mask = mask & within_window(context.positions, context.slot_positions, form.window)
    if any(config.attention_chunks):
        mask = mask & within_chunk(context.positions, context.slot_positions, form.chunk)
    if kv is None:
        q, k, v = project_qkv(config, weights, h, *angles, heads)
        q = _scaled(config, q, context, form)
        mixed = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, weights.sinks)
    else:
        # Written into the whole cache first and read after: the other order copies the layer's cache twice.
        q, kv = context.backend.write_qkv(config, weights, h, angles, kv, context.start, index, heads)
        q = _scaled(config, q, context, form)
        if weights.sinks is None:
            mixed = context.backend.attention(q, *kv, index, mask)
        else:  # the kernels have no sinks
            mixed = attend_layer(q, *kv, index, mask, weights.sinks)
    if weights.output_gate is not None:
        mixed = gate_output(mixed, weights.output_gate, h, config.output_gate)
    out = context.backend.output_projection(weights, mixed, heads)
    return times(apply_norm(out, layer.attention_output_norm, config.rms_norm_eps), config.residual_multiplier), kv


def _angles(context: Context, form: LayerForm) -> Angles:
    """Choose the layer's cosine and sine."""
    if len(context.angles) == 1:
        return context.angles[0]
    if isinstance(form.rope, int):
        return context.angles[form.rope]
    cos, sin = (jnp.stack(side)[form.rope] for side in zip(*context.angles, strict=True))
    return cos, sin


def _scaled(config: DecoderConfig, q: Array, context: Context, form: LayerForm) -> Array:
    """Scale queries: by the model's factor on scores, and in layers without rotary embedding."""
    if config.attention_multiplier is not None:  # attention itself multiplies scores by 1 / √head
        q = times(q, config.attention_multiplier * config.head_dim**0.5)
    if config.query_scale is None:
        return q
    factor = jnp.where(form.rotates, 1.0, query_factor(config.query_scale, context.positions))
    return q * factor[:, :, None, None].astype(q.dtype)


def mlp_block(
    config: DecoderConfig,
    experts: object,
    layer: Layer,
    index: int | Array,
    h: Array,
    valid: Array,
    context: Context,
) -> tuple[Array, Array, RouterInfo | None]:
    """Compute the feed-forward block of normed rows; also the rows that are still valid, and the routing.

    `index` counts sparse layers.
    """
    rows, info = h.reshape(-1, config.hidden_size), None
    if isinstance(layer.mlp, SparseMlp):
        y, info = sparse_mlp(
            config, layer.mlp, experts, index, rows, valid,
            context.compute, context.restrict, context.sharding, context.backend.route,
        )  # fmt: skip
        valid = valid if info.restricted is None else info.restricted.kept
    else:
        y = psum(gated_mlp(rows, layer.mlp, config.hidden_act), context.sharding.ffn)
    out = apply_norm(y.reshape(h.shape), layer.mlp_output_norm, config.rms_norm_eps)
    return times(out, config.residual_multiplier), valid, info


def times(x: Array, factor: float) -> Array:
    """Multiply by a factor of the config; by 1, return `x`."""
    return x if factor == 1.0 else x * factor
