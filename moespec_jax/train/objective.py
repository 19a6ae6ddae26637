"""Training objective: the head predicts the target's distribution, at every step of the unrolled chain."""

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

# (logits of the target, logits of the head), both [..., draft_vocab] -> loss [...].
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
    """Sums of one draft step over its positions.

    Fields:
        loss: summed loss.
        hits: number of counted positions where the head's most probable token is the target's.
        positions: number of counted positions.
        confidence: summed loss of the estimate of acceptance (DSpark); None without one.
    """

    loss: Float[Array, ""]
    hits: Float[Array, ""]
    positions: Float[Array, ""]
    confidence: Float[Array, ""] | None = None


def cross_entropy(target: Array, draft: Array) -> Array:
    """Compute -sum p log q, with p renormalised over the draft vocabulary (EAGLE-3, arXiv:2503.01840)."""
    return -jnp.sum(jax.nn.softmax(target, axis=-1) * jax.nn.log_softmax(draft, axis=-1), axis=-1)


def kl_divergence(target: Array, draft: Array) -> Array:
    """Compute KL(p || q) over the draft vocabulary: the cross-entropy minus the entropy of p."""
    p = jax.nn.softmax(target, axis=-1)
    return jnp.sum(p * (jax.nn.log_softmax(target, axis=-1) - jax.nn.log_softmax(draft, axis=-1)), axis=-1)


def acceptance(target: Array, draft: Array) -> Array:
    """Compute sum min(p, q), the probability that speculative sampling accepts a token drawn from q."""
    return jnp.sum(jnp.minimum(jax.nn.softmax(target, axis=-1), jax.nn.softmax(draft, axis=-1)), axis=-1)


def negative_log_acceptance(target: Array, draft: Array) -> Array:
    """Compute the negative logarithm of the probability of acceptance (SpecForge's LK loss)."""
    return -jnp.log(jnp.maximum(acceptance(target, draft), 1e-8))


def binary_cross_entropy(logits: Array, share: Array) -> Array:
    """Compute the cross-entropy of estimated probabilities, given by their logits, to shares from 0 to 1."""
    return -share * jax.nn.log_sigmoid(logits) - (1.0 - share) * jax.nn.log_sigmoid(-logits)


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
    """Run the target once over whole sequences, without a budget and without gradients."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    cache = empty_cache(config, batch, length, params.embed.dtype, stacked=True) if params.stacked else None
    mask = causal_mask(positions, length)
    hidden, _, info = forward(config, params, tokens, positions, mask, cache, backend, boundaries=boundaries)
    logits = unembed(params, hidden)
    choice = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    in_draft_vocab = jnp.zeros((config.vocab_size,), bool).at[target_ids].set(True)
    assert info.aux_hidden_states is not None
    teacher = Teacher(info.aux_hidden_states, logits[..., target_ids], choice, in_draft_vocab[choice])
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
    """Score every step of the unrolled head.

    At step j, index t is position t + 1 + j. `counts[b, p]` is True where the prediction at position p counts.
    Positions whose most probable token is not in the draft vocabulary have no loss, and count as misses.
    """
    assert head.target_ids is not None
    choice = jnp.searchsorted(head.target_ids, teacher.choice, side="left").astype(jnp.int32)

    def score(step: int, logits: Array) -> StepScore:
        shifted, count = (lambda x: x[:, 1 + step :]), max(tokens.shape[1] - 1 - step, 0)
        logits, counted = logits[:, :count], shifted(counts)
        trained = counted & shifted(teacher.reachable)
        losses = jnp.where(trained, loss(shifted(teacher.logits), logits), 0.0)
        hits = trained & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == shifted(choice))
        return StepScore(jnp.sum(losses), *(jnp.sum(x, dtype=jnp.float32) for x in (hits, counted)))

    return unroll(config, head, embed, teacher.aux_hidden_states, tokens, steps, score, recompute)
