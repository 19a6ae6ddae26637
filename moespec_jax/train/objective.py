"""What the head is trained for: to say what the target says, at every step of the unrolled chain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.train.unroll import unroll

# Takes the target's logits and the head's, both over the draft vocabulary, and gives a loss a position.
Loss = Callable[[Array, Array], Array]


class Teacher(NamedTuple):
    """The target's outputs at each position.

    Fields:
        aux_hidden_states: hidden states that the head reads.
        logits: over the draft vocabulary.
        choice: its most probable token of the whole vocabulary.
        reachable: whether that is in the draft vocabulary.
    """

    aux_hidden_states: Float[Array, "batch tokens aux"]
    logits: Float[Array, "batch tokens draft_vocab"]
    choice: Int[Array, "batch tokens"]
    reachable: Bool[Array, "batch tokens"]


class StepScore(NamedTuple):
    """Of one step: summed loss, how often the head's first choice was the target's, and positions that count."""

    loss: Float[Array, ""]
    hits: Float[Array, ""]
    positions: Float[Array, ""]


def cross_entropy(target: Array, draft: Array) -> Array:
    """-sum p log q, p being renormalised within the draft vocabulary (EAGLE-3's)."""
    return -jnp.sum(jax.nn.softmax(target, axis=-1) * jax.nn.log_softmax(draft, axis=-1), axis=-1)


def kl_divergence(target: Array, draft: Array) -> Array:
    """KL(p || q) within the draft vocabulary: cross-entropy less a constant."""
    p = jax.nn.softmax(target, axis=-1)
    return jnp.sum(p * (jax.nn.log_softmax(target, axis=-1) - jax.nn.log_softmax(draft, axis=-1)), axis=-1)


def negative_log_acceptance(target: Array, draft: Array) -> Array:
    """-log sum min(p, q): of the chance that speculative sampling accepts a drawn token (SpecForge's LK loss)."""
    overlap = jnp.minimum(jax.nn.softmax(target, axis=-1), jax.nn.softmax(draft, axis=-1))
    return -jnp.log(jnp.maximum(jnp.sum(overlap, axis=-1), 1e-8))


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "kl": kl_divergence,
    "acceptance": negative_log_acceptance,
}


def run_teacher(
    config: DecoderConfig,
    params: Decoder,
    backend: Backend,
    boundaries: tuple[int, ...],
    target_ids: Int[Array, " draft_vocab"],
    tokens: Int[Array, "batch tokens"],
) -> Teacher:
    """Run the target once over whole sequences, exactly and without gradient."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    cache = empty_cache(config, batch, length, params.embed.dtype, stacked=True) if params.stacked else None
    mask = causal_mask(positions, length)
    hidden, _, info = forward(config, params, tokens, positions, mask, cache, backend, boundaries=boundaries)
    logits = unembed(params, hidden)
    choice = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    known = jnp.zeros((config.vocab_size,), bool).at[target_ids].set(True)
    assert info.aux_hidden_states is not None
    teacher = Teacher(info.aux_hidden_states, logits[..., target_ids], choice, known[choice])
    return jax.tree.map(jax.lax.stop_gradient, teacher)


def unrolled_scores(
    config: DraftConfig,
    head: DraftHead,
    embed: Float[Array, "vocab model"],
    teacher: Teacher,
    tokens: Int[Array, "batch tokens"],
    counts: Bool[Array, "batch tokens"],
    steps: int,
    loss: Loss,
    recompute: bool,
) -> list[StepScore]:
    """Every step's score. `counts[b, p]` says whether the token that the target predicts at position p matters.

    At step j, index t stands for position t + 1 + j. Positions whose first choice the head cannot say bear no loss, but
    count as misses.
    """
    choice = jnp.searchsorted(head.target_ids, teacher.choice, side="left").astype(jnp.int32)

    def judge(step: int, logits: Array) -> StepScore:
        there, count = (lambda x: x[:, 1 + step :]), max(tokens.shape[1] - 1 - step, 0)
        logits, matters = logits[:, :count], there(counts)
        trains = matters & there(teacher.reachable)
        losses = jnp.where(trains, loss(there(teacher.logits), logits), 0.0)
        hits = trains & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == there(choice))
        return StepScore(jnp.sum(losses), *(jnp.sum(x, dtype=jnp.float32) for x in (hits, matters)))

    return unroll(config, head, embed, teacher.aux_hidden_states, tokens, steps, judge, recompute)
