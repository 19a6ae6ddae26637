"""Blocks of a DFlash head at many positions of whole sequences at once, as training and the probe of boundaries need.

The block of an anchor, the newest known token, attends to the features of the tokens before it and to itself, as in
decoding (`nn/dflash.py`). Keys and values of the features are computed once for all blocks of a sequence, so that
attention costs (tokens + block) scores a row. Where a drafted token depends on the one before it (DSpark), that is the
true one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.attention import project_qkv
from moespec_jax.nn.dflash import (
    DFlashHead,
    block_logits,
    block_mask,
    confidence_logits,
    fuse_context,
    markov_step,
)
from moespec_jax.nn.eagle3 import finish_layer
from moespec_jax.nn.layers import rms_norm, rope_angles
from moespec_jax.train.objective import Loss, StepScore, Teacher, acceptance, binary_cross_entropy


def block_outputs(
    config: DFlashConfig,
    head: DFlashHead,
    embed: Float[Array, "vocab model"],
    aux: Float[Array, "batch tokens aux"],
    tokens: Int[Array, "batch tokens"],
    anchors: Int[Array, "batch anchors"],
) -> Float[Array, "batch anchors block model"]:
    """Compute the outputs after the last norm of the block of every anchor, a position of its sequence."""
    batch, length = tokens.shape
    count, block = anchors.shape[1], config.block_size
    embed = embed if head.embed is None else head.embed
    known = jnp.take_along_axis(tokens, anchors, axis=1)
    rows = jnp.full((batch, count, block), config.mask_token_id, jnp.int32).at[:, :, 0].set(known)
    x = embed[rows.reshape(batch, -1)]
    features = fuse_context(config, head, aux)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], tokens.shape)
    own = (anchors[:, :, None] + jnp.arange(block, dtype=jnp.int32)[None, None, :]).reshape(batch, -1)
    longest = jnp.int32(length + block)
    cos, sin = rope_angles(
        config.rope, config.head_dim, config.max_position_embeddings, jnp.concatenate([places, own], axis=1), longest
    )
    for number, layer in enumerate(head.layers):
        h = jnp.concatenate([features, rms_norm(x, layer.input_norm, config.rms_norm_eps)], axis=1)
        q, k, v = project_qkv(config, layer.attention, h, cos, sin)
        kind = config.sliding_windows[number], config.causal[number]
        # As if the block followed a context of all tokens: of these, it attends to those before its anchor.
        mask = jax.vmap(lambda row, kind=kind: block_mask(config, kind, row, length + block), in_axes=1, out_axes=1)
        x = finish_layer(config, layer, x, _attend(q[:, length:], k, v, _columns(mask(anchors), anchors, length)))
    return rms_norm(x, head.norm, config.rms_norm_eps).reshape(batch, count, block, -1)


def block_scores(
    config: DFlashConfig,
    head: DFlashHead,
    embed: Float[Array, "vocab model"],
    teacher: Teacher,
    tokens: Int[Array, "batch tokens"],
    counts: Bool[Array, "batch tokens"],
    anchors: Int[Array, "batch anchors"],
    loss: Loss,
) -> list[StepScore]:
    """Score every drafted token of the blocks of all anchors; other arguments as those of `unrolled_scores`.

    The loss of an estimate of acceptance is its cross-entropy to sum min(p, q), the probability that speculative
    sampling accepts, which has no gradient, and is 0 where the target's token is not in the draft vocabulary.
    """
    assert head.target_ids is not None
    hidden = block_outputs(config, head, embed, teacher.aux_hidden_states, tokens, anchors)
    choice = jnp.searchsorted(head.target_ids, teacher.choice, side="left").astype(jnp.int32)
    first = 0 if config.sample_from_anchor else 1

    @jax.checkpoint
    def score(rows: Array, recurrent: Array, step: Array) -> tuple[StepScore, Array]:
        at = anchors + step  # the target's row that draws the same token
        inside, at = at < tokens.shape[1], jnp.minimum(at, tokens.shape[1] - 1)
        best, reachable, counted, before = (
            jnp.take_along_axis(x, at, axis=1) for x in (choice, teacher.reachable, counts, tokens)
        )
        counted = counted & inside
        trained = counted & reachable
        logits, recurrent = _biased_logits(config, head, rows, before, recurrent)
        target = jnp.take_along_axis(teacher.logits, at[:, :, None], axis=1)
        hits = trained & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == best)
        losses = jnp.where(trained, loss(target, logits), 0.0)
        confidence = None
        if head.confidence is not None:
            share = jnp.where(reachable, jax.lax.stop_gradient(acceptance(target, logits)), 0.0)
            errors = binary_cross_entropy(confidence_logits(config, head, before, rows), share)
            confidence = jnp.sum(jnp.where(counted, errors, 0.0))
        correct, count = (jnp.sum(x, dtype=jnp.float32) for x in (hits, counted))
        return StepScore(jnp.sum(losses), correct, count, confidence), recurrent

    scores, recurrent = [], jnp.zeros((*anchors.shape, config.markov_rank), hidden.dtype)
    for step in range(config.drafted):
        found, recurrent = score(hidden[:, :, first + step], recurrent, jnp.int32(step))
        scores.append(found)
    return scores


def _biased_logits(
    config: DFlashConfig,
    head: DFlashHead,
    rows: Float[Array, "batch anchors model"],
    before: Int[Array, "batch anchors"],
    recurrent: Float[Array, "batch anchors rank"],
) -> tuple[Float[Array, "batch anchors draft_vocab"], Float[Array, "batch anchors rank"]]:
    """Compute the logits of one drafted token of every block, with the Markov bias by the token before it, and the
    recurrent state of the bias."""
    logits = block_logits(head, rows)
    if head.markov is None:
        return logits, recurrent
    flat = (x.reshape(-1, *x.shape[2:]) for x in (recurrent, before, rows))
    bias, after = markov_step(config, head.markov, *flat)
    return logits + bias.reshape(logits.shape), after.reshape(recurrent.shape)


def random_anchors(
    count: int, seed: int, tokens: Int[Array, "batch tokens"], counts: Bool[Array, "batch tokens"]
) -> Int[Array, "batch anchors"]:
    """Choose `count` positions of every row after which a token counts, or others where there are too few: a function
    of seed and tokens alone, so that a run that continues chooses alike."""
    key = jax.random.fold_in(jax.random.key(seed), jnp.sum(tokens.astype(jnp.uint32)))
    order = jax.random.uniform(key, tokens.shape) + counts.astype(jnp.float32)
    return jax.lax.top_k(order, count)[1].astype(jnp.int32)


def _columns(mask: Bool[Array, "batch anchors block slots"], anchors: Array, length: int) -> Array:
    """Split a mask over a block's context and itself into columns of tokens and columns of the block."""
    slots = jnp.arange(mask.shape[-1], dtype=jnp.int32)[None, None, :]
    before = (slots < anchors[:, :, None])[:, :, None, :length] & mask[..., :length]
    own = anchors[:, :, None, None] + jnp.arange(mask.shape[2], dtype=jnp.int32)[None, None, None, :]
    return jnp.concatenate(
        [before, jnp.take_along_axis(mask, jnp.broadcast_to(own, mask.shape[:3] + own.shape[3:]), axis=3)], axis=3
    )


def _attend(
    q: Float[Array, "batch rows heads head"],
    k: Float[Array, "batch keys kv_heads head"],
    v: Float[Array, "batch keys kv_heads head"],
    mask: Bool[Array, "batch anchors block seen"],
) -> Float[Array, "batch rows q_out"]:
    """Attend from the rows of every block to the tokens' keys and to those of its own block."""
    batch, anchors, block, _ = mask.shape
    tokens, groups, head = k.shape[1] - anchors * block, k.shape[2], q.shape[3]
    grouped = q.reshape(batch, anchors, block, groups, -1, head)
    mine = (batch, anchors, block, groups, head)
    own_k, own_v = k[:, tokens:].reshape(mine), v[:, tokens:].reshape(mine)
    scores = [
        jnp.einsum("banghd,bsgd->bghans", grouped, k[:, :tokens], preferred_element_type=jnp.float32),
        jnp.einsum("banghd,bamgd->bghanm", grouped, own_k, preferred_element_type=jnp.float32),
    ]
    whole = jnp.concatenate(scores, axis=-1) * head**-0.5
    whole = jnp.where(mask[:, None, None], whole, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(whole, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bghans,bsgd->banghd", weights[..., :tokens], v[:, :tokens])
    mixed = mixed + jnp.einsum("bghanm,bamgd->banghd", weights[..., tokens:], own_v)
    return mixed.reshape(batch, anchors * block, -1)
