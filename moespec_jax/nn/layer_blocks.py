"""The two blocks of a transformer layer: attention, and a dense or sparse feed-forward block."""

from typing import NamedTuple

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import Attention, attend, attend_layer, project_qkv, within_window
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.layers import GatedMlp, gated_mlp
from moespec_jax.nn.moe import ExpertCompute, Restrict, RouterInfo, SparseMlp, sparse_mlp
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import psum
from moespec_jax.parallel.mesh import ShardingPlan


@struct.dataclass
class Layer:
    """One pre-norm transformer layer without its routed experts; stacked layers have a leading axis."""

    input_norm: Float[Array, "*stack model"]
    attention: Attention
    post_attention_norm: Float[Array, "*stack model"]
    mlp: GatedMlp | SparseMlp

    __repr__ = summary


class Context(NamedTuple):
    """Arguments that all layers of one forward pass share.

    Fields:
        positions: position of every token.
        slot_positions: position of the token in every cache slot.
        mask: whether a token attends to a slot.
        start: cache slot of each sequence's first token.
        cos, sin: rotary embedding of every token.
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
    cos: Float[Array, "*batch tokens half"]
    sin: Float[Array, "*batch tokens half"]
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
    window: int | Array,
    kv: tuple[Array, Array] | None,
    index: Array | None = None,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Compute attention of normed rows, and write the tokens' keys and values.

    `kv` is the cache of this layer, or, with `index`, of all layers, of which layer `index` is written and read.
    """
    angles, heads, mask = (context.cos, context.sin), context.sharding.heads, context.mask
    if any(config.sliding_windows):
        mask = mask & within_window(context.positions, context.slot_positions, window)
    if kv is None:
        q, k, v = project_qkv(config, layer.attention, h, *angles, heads)
        mixed = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, layer.attention.sinks)
    else:
        # Written into the whole cache first and read after: the other order copies the layer's cache twice.
        q, kv = context.backend.write_qkv(config, layer.attention, h, angles, kv, context.start, index, heads)
        if layer.attention.sinks is None:
            mixed = context.backend.attention(q, *kv, index, mask)
        else:  # the kernels have no sinks
            mixed = attend_layer(q, *kv, index, mask, layer.attention.sinks)
    return context.backend.output_projection(layer.attention, mixed, heads), kv


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
    return y.reshape(h.shape), valid, info
