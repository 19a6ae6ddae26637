"""The EAGLE-3 draft head as pure functions (arXiv:2503.01840): tapped states of the target in, draft logits out.

Pair t is the target's feature of token t beside the embedding of token t + 1, at position t, and predicts token t + 2.
The state that a step hands to the next is the output of the layer before the last norm.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DraftConfig
from moespec_jax.nn.attention import Attention, attend, output_projection, project_qkv
from moespec_jax.nn.cache import Cache, write_rows
from moespec_jax.nn.layers import GatedMlp, gated_mlp, rms_norm, rope_angles
from moespec_jax.parallel.collectives import all_gather, data_axes, pmax, psum
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan


@struct.dataclass
class DraftLayer:
    """One layer. The first reads embedding and feature side by side, each with its norm; `hidden_norm` is the
    feature's and None in later layers, which are ordinary ones."""

    input_norm: Float[Array, " model"]
    hidden_norm: Float[Array, " model"] | None
    attention: Attention
    post_attention_norm: Float[Array, " model"]
    mlp: GatedMlp


@struct.dataclass
class DraftHead:
    """All parameters of a draft head; what a variant lacks is None.

    `fc` is `[in, out]`. `fc_norms` holds one norm over all tapped states (`norm_before_fc`) or one each (`fc_norm`).
    `target_ids` maps the head's tokens to the target's, ascending. `embed` is None where the target's is shared.
    """

    fc: Float[Array, "aux model"]
    layers: tuple[DraftLayer, ...]
    norm: Float[Array, " model"]
    lm_head: Float[Array, "draft_vocab model"]
    target_ids: Int[Array, " draft_vocab"]
    fc_bias: Float[Array, " model"] | None = None
    fc_norms: tuple[Float[Array, " width"], ...] = ()
    embed: Float[Array, "vocab model"] | None = None
    sharding: ShardingPlan = struct.field(pytree_node=False, default=REPLICATED)


def empty_draft_cache(config: DraftConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache of `slots` pairs per sequence, all free; never stacked: there is seldom more than one layer."""
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)) for _ in "kv")
    return Cache(k, v, jnp.zeros((batch,), jnp.int32))


def fuse_aux(
    config: DraftConfig, head: DraftHead, aux: Float[Array, "batch tokens aux"]
) -> Float[Array, "batch tokens model"]:
    """The target's tapped states, side by side from low to high, as one feature a token."""
    if config.norm_before_fc:
        aux = rms_norm(aux, head.fc_norms[0], config.rms_norm_eps)
    if config.fc_norm:
        parts = jnp.split(aux, len(config.boundaries), axis=-1)
        normed = [rms_norm(part, norm, config.rms_norm_eps) for part, norm in zip(parts, head.fc_norms, strict=True)]
        aux = jnp.concatenate(normed, axis=-1)
    feature = aux @ head.fc
    return feature if head.fc_bias is None else feature + head.fc_bias[None, None, :]


def draft_forward(
    config: DraftConfig,
    head: DraftHead,
    embedded: Float[Array, "batch tokens model"],
    features: Float[Array, "batch tokens model"],
    positions: Int[Array, "batch tokens"],
    mask: Bool[Array, "batch tokens slots"],
    cache: Cache,
) -> tuple[Float[Array, "batch tokens model"], Cache]:
    """Outputs before the last norm, and the cache with this pass's rows written from `cache.length[b]` on.

    `embedded` are the embeddings of the next tokens; `features` come from `fuse_aux` or from `next_features`.
    `length` itself is left to the caller, who knows how many rows count.
    """
    # Angles are made for the positions at hand: whatever context the head was trained on, there is no table to leave.
    longest = pmax(jnp.max(positions) + 1, data_axes())
    cos, sin = rope_angles(config.rope, config.head_dim, config.max_position_embeddings, positions, longest)
    x, keys, values = features, [], []
    for layer, k_store, v_store in zip(head.layers, cache.k, cache.v, strict=True):
        h, x = layer_input(config, layer, embedded, x)
        q, k, v = project_qkv(config, layer.attention, h, cos, sin, head.sharding.heads)
        keys.append(write_rows(k_store, k, cache.length))
        values.append(write_rows(v_store, v, cache.length))
        x = finish_layer(config, layer, x, attend(q, keys[-1], values[-1], mask), head.sharding)
    return x, dataclasses.replace(cache, k=tuple(keys), v=tuple(values))


def layer_input(config: DraftConfig, layer: DraftLayer, embedded: Array, x: Array) -> tuple[Array, Array]:
    """What a layer's attention reads, and the residual stream it adds to."""
    if layer.hidden_norm is None:
        return rms_norm(x, layer.input_norm, config.rms_norm_eps), x
    hidden = rms_norm(x, layer.hidden_norm, config.rms_norm_eps)
    both = jnp.concatenate([rms_norm(embedded, layer.input_norm, config.rms_norm_eps), hidden], axis=-1)
    return both, hidden if config.norm_before_residual else x


def finish_layer(
    config: DraftConfig, layer: DraftLayer, x: Array, attended: Array, sharding: ShardingPlan = REPLICATED
) -> Array:
    """The residual stream after attention's output and the MLP."""
    x = x + output_projection(layer.attention, attended, sharding.heads)
    rows = rms_norm(x, layer.post_attention_norm, config.rms_norm_eps).reshape(-1, config.hidden_size)
    return x + psum(gated_mlp(rows, layer.mlp, config.hidden_act), sharding.ffn).reshape(x.shape)


def next_features(config: DraftConfig, head: DraftHead, outputs: Float[Array, "*batch model"]) -> Array:
    """What the next draft step takes in place of a true feature."""
    return rms_norm(outputs, head.norm, config.rms_norm_eps) if config.norm_output else outputs


def draft_logits(
    config: DraftConfig, head: DraftHead, outputs: Float[Array, "*batch model"]
) -> Float[Array, "*batch draft_vocab"]:
    """Logits over the draft vocabulary, float32."""
    hidden = rms_norm(outputs, head.norm, config.rms_norm_eps)
    logits = jnp.einsum("...d,vd->...v", hidden, head.lm_head, preferred_element_type=jnp.float32)
    return all_gather(logits, head.sharding.vocabulary)
