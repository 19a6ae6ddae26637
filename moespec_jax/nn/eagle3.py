"""The EAGLE-3 draft head (arXiv:2503.01840) as pure functions of parameters, features, mask and cache.

Pair t is the feature of token t, which `fuse_aux` computes from the target's auxiliary hidden states, concatenated
with the embedding of token t + 1. It has position t and predicts token t + 2. Where the target has not computed token
t yet, the head's output at pair t - 1 takes the place of the feature (`next_features`).
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DraftConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.attention import Attention, OutputProjection, output_projection
from moespec_jax.nn.backend import PLAIN, Backend
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.layers import GatedMlp, gated_mlp, rms_norm, rope_angles
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import data_axes, pmax, psum
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan


@struct.dataclass
class DraftLayer:
    """One layer of a draft head. The first reads the normed embedding and the normed feature, concatenated; later ones
    are ordinary pre-norm layers.

    Fields:
        input_norm: norm of the embedding in the first layer, of the residual stream in later ones.
        hidden_norm: norm of the feature; None in later layers.
    """

    input_norm: Float[Array, " model"]
    hidden_norm: Float[Array, " model"] | None
    attention: Attention
    post_attention_norm: Float[Array, " model"]
    mlp: GatedMlp

    __repr__ = summary


@struct.dataclass
class DraftHead:
    """All parameters of a draft head.

    Fields:
        fc: projection of the auxiliary hidden states to a feature, `[in, out]`.
        layers: layers in order of depth.
        norm: last norm.
        lm_head: output matrix; on a mesh, a device's shard of its rows. None only until a head that shares the target's
            is given it.
        target_ids: id in the target's vocabulary of each token of the draft vocabulary, ascending; None while a head is
            trained, since ids have no gradient.
        fc_bias: None where the variant has none.
        fc_norms: norms before `fc`: one over all auxiliary hidden states (`norm_before_fc`), or one for each
            (`fc_norm`).
        embed: input embedding; None where it is the target's.
        sharding: which parts are split over which axes of a mesh, where the program runs on every device of one.
    """

    fc: Float[Array, "aux model"]
    layers: tuple[DraftLayer, ...]
    norm: Float[Array, " model"]
    lm_head: Float[Array, "draft_vocab_shard model"] | None
    target_ids: Int[Array, " draft_vocab"] | None
    fc_bias: Float[Array, " model"] | None = None
    fc_norms: tuple[Float[Array, " width"], ...] = ()
    embed: Float[Array, "vocab model"] | None = None
    sharding: ShardingPlan = struct.field(pytree_node=False, default=REPLICATED)

    __repr__ = summary


def fuse_aux(
    config: DraftConfig, head: DraftHead, aux: Float[Array, "batch tokens aux"]
) -> Float[Array, "batch tokens model"]:
    """Compute every token's feature from the target's auxiliary hidden states, concatenated by ascending boundary."""
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
    backend: Backend = PLAIN,
) -> tuple[Float[Array, "batch tokens model"], Cache]:
    """Run the head over some pairs of every sequence.

    Args:
        config: the head's settings.
        head: its parameters.
        embedded: embedding of each pair's second token.
        features: feature of each pair's first token, from `fuse_aux` or `next_features`.
        positions: position of every pair.
        mask: `mask[b, t, s]` is true where pair t of sequence b attends to cache slot s.
        cache: KV cache; this pass writes the rows of its pairs from slot `cache.length[b]` on. `length` itself stays:
            the caller decides how many of the rows to keep.
        backend: forms of attention and of the projection before it.

    Returns:
        Outputs before the last norm, and the cache with the new rows.
    """
    # Angles are computed for the given positions, which may exceed `max_position_embeddings`.
    longest = pmax(jnp.max(positions) + 1, data_axes())
    cos, sin = rope_angles(config.rope, config.head_dim, config.max_position_embeddings, positions, longest)
    x, keys, values = features, [], []
    for layer, k_store, v_store in zip(head.layers, cache.k, cache.v, strict=True):
        h, x = layer_input(config, layer, embedded, x)
        kv, heads = (k_store, v_store), head.sharding.heads
        q, (k, v) = backend.write_qkv(config, layer.attention, h, (cos, sin), kv, cache.length, None, heads)
        keys.append(k)
        values.append(v)
        attended = backend.attention(q, k, v, None, mask)
        x = finish_layer(config, layer, x, attended, head.sharding, backend.output_projection)
    return x, dataclasses.replace(cache, k=tuple(keys), v=tuple(values))


def layer_input(
    config: DraftConfig,
    layer: DraftLayer,
    embedded: Float[Array, "batch tokens model"],
    x: Float[Array, "batch tokens model"],
) -> tuple[Float[Array, "batch tokens inputs"], Float[Array, "batch tokens model"]]:
    """Compute the input of a layer's attention, and the residual stream to which the layer adds.

    `inputs` is `2 * model` in the first layer, `model` in later ones.
    """
    if layer.hidden_norm is None:
        return rms_norm(x, layer.input_norm, config.rms_norm_eps), x
    hidden = rms_norm(x, layer.hidden_norm, config.rms_norm_eps)
    both = jnp.concatenate([rms_norm(embedded, layer.input_norm, config.rms_norm_eps), hidden], axis=-1)
    return both, hidden if config.norm_before_residual else x


def finish_layer(
    config: DraftConfig | DFlashConfig,
    layer: DraftLayer,
    x: Float[Array, "batch tokens model"],
    attended: Float[Array, "batch tokens q_out"],
    sharding: ShardingPlan = REPLICATED,
    project: OutputProjection = output_projection,
) -> Float[Array, "batch tokens model"]:
    """Add the projected output of attention, then the MLP, to the residual stream `x`."""
    x = x + project(layer.attention, attended, sharding.heads)
    rows = rms_norm(x, layer.post_attention_norm, config.rms_norm_eps).reshape(-1, config.hidden_size)
    return x + psum(gated_mlp(rows, layer.mlp, config.hidden_act), sharding.ffn).reshape(x.shape)


def next_features(
    config: DraftConfig, head: DraftHead, outputs: Float[Array, "*batch model"]
) -> Float[Array, "*batch model"]:
    """Compute the features that the next draft step reads in place of the target's."""
    return rms_norm(outputs, head.norm, config.rms_norm_eps) if config.norm_output else outputs


def draft_logits(
    config: DraftConfig, head: DraftHead, outputs: Float[Array, "*batch model"]
) -> Float[Array, "*batch draft_vocab_shard"]:
    """Compute float32 logits over the draft vocabulary; on a mesh, over this device's shard of it."""
    assert head.lm_head is not None
    hidden = rms_norm(outputs, head.norm, config.rms_norm_eps)
    return jnp.einsum("...d,vd->...v", hidden, head.lm_head, preferred_element_type=jnp.float32)
