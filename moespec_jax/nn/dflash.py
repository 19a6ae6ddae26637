"""The DFlash draft head as pure functions of parameters, context and block; also the parts that DSpark adds.

The context of a block are all tokens before the newest one: their hidden states in the target, fused to one feature
each (`fuse_context`), enter every layer as keys and values only. They depend on nothing else, so that they are computed
once and cached (`extend_context`). The rows of a block are the newest token and mask tokens behind it, which attend to
the context and to each other (`block_forward`); their keys and values are written behind those of the context, and the
next pass overwrites them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.attention import write_qkv
from moespec_jax.nn.backend import PLAIN, Backend
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.eagle3 import DraftLayer, finish_layer
from moespec_jax.nn.layers import rms_norm, rope_angles
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import data_axes, pmax
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan


@struct.dataclass
class MarkovBias:
    """The bias that the token drafted last gives to the logits of the next one, of low rank.

    Fields:
        previous: vector of every token of the target that may come before.
        following: vector of every token of the draft vocabulary.
        mixer: projection of the gate (`gated`: of hidden state and previous vector) or of the recurrence (`rnn`: of
            state, previous vector and hidden state), `[in, out]`; None in the vanilla form.
        mixer_bias: its bias.
    """

    previous: Float[Array, "vocab rank"]
    following: Float[Array, "draft_vocab rank"]
    mixer: Float[Array, "inputs outputs"] | None = None
    mixer_bias: Float[Array, " outputs"] | None = None

    __repr__ = summary


@struct.dataclass
class ConfidenceHead:
    """Estimate of the probability that a drafted token is accepted where all before it were: a logistic regression."""

    weight: Float[Array, "1 inputs"]
    bias: Float[Array, "1"]

    __repr__ = summary


@struct.dataclass
class DFlashHead:
    """All parameters of a DFlash or DSpark head.

    Fields:
        fc: projection of the auxiliary hidden states to a feature, `[in, out]`.
        hidden_norm: norm of the feature.
        layers: layers in order of depth; none has a `hidden_norm`.
        norm: last norm.
        lm_head: output matrix; on a mesh, a device's shard of its rows. None only until a head that shares the target's
            is given it.
        target_ids: id in the target's vocabulary of each token of the draft vocabulary, ascending; None while a head is
            trained.
        embed: input embedding; None where it is the target's.
        markov: bias by the token drafted last (DSpark); None where there is none.
        confidence: estimate of acceptance (DSpark); None where there is none.
        sharding: which parts are split over which axes of a mesh.
    """

    fc: Float[Array, "aux model"]
    hidden_norm: Float[Array, " model"]
    layers: tuple[DraftLayer, ...]
    norm: Float[Array, " model"]
    lm_head: Float[Array, "draft_vocab_shard model"] | None
    target_ids: Int[Array, " draft_vocab"] | None
    embed: Float[Array, "vocab model"] | None = None
    markov: MarkovBias | None = None
    confidence: ConfidenceHead | None = None
    sharding: ShardingPlan = struct.field(pytree_node=False, default=REPLICATED)

    __repr__ = summary


def fuse_context(
    config: DFlashConfig, head: DFlashHead, aux: Float[Array, "batch tokens aux"]
) -> Float[Array, "batch tokens model"]:
    """Compute every token's feature from the target's auxiliary hidden states, concatenated by ascending boundary."""
    return rms_norm(aux @ head.fc, head.hidden_norm, config.rms_norm_eps)


def extend_context(
    config: DFlashConfig,
    head: DFlashHead,
    features: Float[Array, "batch tokens model"],
    positions: Int[Array, "batch tokens"],
    cache: Cache,
) -> Cache:
    """Write the keys and values of some tokens' features into every layer, from slot `cache.length[b]` on; `length`
    itself stays."""
    angles, keys, values = _angles(config, positions), [], []
    for layer, *kv in zip(head.layers, cache.k, cache.v, strict=True):
        # Queries are not used, and so are not computed.
        _, (k, v) = write_qkv(
            config, layer.attention, features, angles, (kv[0], kv[1]), cache.length, None, head.sharding.heads
        )
        keys.append(k)
        values.append(v)
    return dataclasses.replace(cache, k=tuple(keys), v=tuple(values))


def block_forward(
    config: DFlashConfig,
    head: DFlashHead,
    embedded: Float[Array, "batch block model"],
    positions: Int[Array, "batch block"],
    cache: Cache,
    backend: Backend = PLAIN,
) -> tuple[Float[Array, "batch block model"], Cache]:
    """Run one block of every sequence.

    Args:
        config: the head's settings.
        head: its parameters.
        embedded: embeddings of the newest token and of the mask tokens behind it.
        positions: position of every row.
        cache: the context, `cache.length[b]` rows; this pass writes the block's rows behind it.
        backend: forms of attention and of the projection before it.

    Returns:
        Outputs after the last norm, and the cache with the new rows and unchanged lengths.
    """
    angles, x, keys, values = _angles(config, positions), embedded, [], []
    masks = {kind: block_mask(config, kind, cache.length, cache.slots) for kind in set(_kinds(config))}
    for layer, kind, *kv in zip(head.layers, _kinds(config), cache.k, cache.v, strict=True):
        h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        heads = head.sharding.heads
        q, (k, v) = backend.write_qkv(config, layer.attention, h, angles, (kv[0], kv[1]), cache.length, None, heads)
        keys.append(k)
        values.append(v)
        attended = backend.attention(q, k, v, None, masks[kind])
        x = finish_layer(config, layer, x, attended, head.sharding, backend.output_projection)
    return rms_norm(x, head.norm, config.rms_norm_eps), dataclasses.replace(cache, k=tuple(keys), v=tuple(values))


def block_mask(
    config: DFlashConfig, kind: tuple[int, bool], start: Int[Array, " batch"], slots: int
) -> Bool[Array, "batch block slots"]:
    """Build the mask of a layer of this window and causality: true where a row of the block attends to a slot. Slots
    before `start[b]` are the context, the slots from there on the block itself."""
    window, causal = kind
    row = jnp.arange(config.block_size, dtype=jnp.int32)[None, :, None]
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None, :] - start[:, None, None]
    seen = slot <= row if causal else jnp.broadcast_to(slot < config.block_size, (len(start), row.shape[1], slots))
    if window and config.anchored_windows:
        return seen & (slot >= -window)
    return seen & (jnp.abs(row - slot) < window) if window else seen


def block_logits(head: DFlashHead, hidden: Float[Array, "*batch model"]) -> Float[Array, "*batch draft_vocab_shard"]:
    """Compute float32 logits over the draft vocabulary, without a Markov bias; on a mesh, over this device's shard."""
    assert head.lm_head is not None
    return jnp.einsum("...d,vd->...v", hidden, head.lm_head, preferred_element_type=jnp.float32)


def markov_step(
    config: DFlashConfig,
    markov: MarkovBias,
    state: Float[Array, "batch rank"],
    tokens: Int[Array, " batch"],
    hidden: Float[Array, "batch model"],
) -> tuple[Float[Array, "batch following"], Float[Array, "batch rank"]]:
    """Compute the bias that the target's `tokens` give to the logits after them, of the tokens of `markov.following`,
    and the next recurrent state, which begins with zeros (`rnn`; other forms leave it as it is)."""
    previous = markov.previous[tokens]
    mixed = previous
    if config.markov != "vanilla":
        assert markov.mixer is not None and markov.mixer_bias is not None
        parts = [hidden, previous] if config.markov == "gated" else [state, previous, hidden]
        projected = jnp.concatenate(parts, axis=-1) @ markov.mixer + markov.mixer_bias[None, :]
        if config.markov == "gated":
            mixed = jax.nn.sigmoid(projected) * previous
        else:
            gate, candidate, output = jnp.split(projected, 3, axis=-1)
            gate = jax.nn.sigmoid(gate)
            state, mixed = gate * state + (1.0 - gate) * jnp.tanh(candidate), jnp.tanh(output)
    return jnp.einsum("br,vr->bv", mixed, markov.following, preferred_element_type=jnp.float32), state


def log_confidence(
    config: DFlashConfig,
    head: DFlashHead,
    tokens: Int[Array, "batch drafted"],
    hidden: Float[Array, "batch drafted model"],
) -> Float[Array, "batch drafted"]:
    """Estimate the log-probability that each drafted token is accepted where all before it were, from the rows that
    draft them and from the `tokens` before them."""
    return jax.nn.log_sigmoid(confidence_logits(config, head, tokens, hidden))


def confidence_logits(
    config: DFlashConfig,
    head: DFlashHead,
    tokens: Int[Array, "batch drafted"],
    hidden: Float[Array, "batch drafted model"],
) -> Float[Array, "batch drafted"]:
    """Compute the logits of the probabilities that `log_confidence` estimates."""
    assert head.confidence is not None
    if config.confidence == "hidden and markov":
        assert head.markov is not None
        hidden = jnp.concatenate([hidden, head.markov.previous[tokens]], axis=-1)
    logits = jnp.einsum("btd,cd->btc", hidden, head.confidence.weight, preferred_element_type=jnp.float32)[..., 0]
    return logits + head.confidence.bias[0].astype(jnp.float32)


def _kinds(config: DFlashConfig) -> list[tuple[int, bool]]:
    """List window and causality of every layer."""
    return list(zip(config.sliding_windows, config.causal, strict=True))


def _angles(config: DFlashConfig, positions: Int[Array, "batch tokens"]) -> tuple[Array, Array]:
    """Compute cosine and sine of the given positions, which may exceed `max_position_embeddings`."""
    longest = pmax(jnp.max(positions) + 1, data_axes())
    return rope_angles(config.rope, config.head_dim, config.max_position_embeddings, positions, longest)
