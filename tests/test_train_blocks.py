"""Blocks of a DFlash head in training are the blocks of decoding, in NumPy."""

import dataclasses
from typing import Any

import dflash_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dflash_oracle import BASE, BLOCK, VARIANTS, VOCAB
from driver import fast_jit

from moespec_jax.train.blocks import block_outputs, block_scores
from moespec_jax.train.objective import LOSSES, Teacher, acceptance, binary_cross_entropy

TOKENS = 20


@pytest.mark.slow_except("windows")
@pytest.mark.parametrize("variant", ["base", "windows", "windows of each row"])
def test_blocks_of_training_are_those_of_decoding(variant: str) -> None:
    """At several anchors of each sequence, the last with no tokens behind them."""
    config, rng = dataclasses.replace(BASE, **VARIANTS[variant]), np.random.default_rng(0)
    head = oracle.head_of(config)
    ids, aux = rng.integers(0, VOCAB, (2, TOKENS)), rng.normal(size=(2, TOKENS, config.aux_size)).astype(np.float32)
    embedding, anchors = rng.normal(size=(VOCAB, 32)).astype(np.float32), np.array([[1, 8, 19], [3, 4, 16]])
    out = fast_jit(lambda head, *rest: block_outputs(config, head, *rest))(
        head, jnp.asarray(embedding), jnp.asarray(aux), jnp.asarray(ids, jnp.int32), jnp.asarray(anchors, jnp.int32)
    )
    for b, row in enumerate(anchors.tolist()):
        for a, root in enumerate(row):
            embedded = embedding[[ids[b, root], *[config.mask_token_id] * (BLOCK - 1)]]
            context = oracle.features(config, head, aux[b, :root].astype(np.float64))
            np.testing.assert_allclose(out[b, a], oracle.block(config, head, context, embedded), atol=1e-5)


SCORED: dict[str, dict[str, Any]] = {
    "DFlash": {},
    "from the anchor": dict(sample_from_anchor=True),
    "vanilla": VARIANTS["vanilla"],
    "gated": VARIANTS["gated"],
    "rnn": VARIANTS["rnn"],
    "rnn with an estimate": VARIANTS["rnn"] | dict(confidence="hidden and markov", sample_from_anchor=True),
    "estimate alone": VARIANTS["confidence alone"],
}


@pytest.mark.slow_except("vanilla")
@pytest.mark.parametrize("variant", SCORED)
def test_scores_compare_each_drafted_token_with_the_target_s(variant: str) -> None:
    """Row by row: the token drafted at depth j is that of the target's row j tokens behind the anchor, and depends on
    the true token before it."""
    config, rng = dataclasses.replace(BASE, **SCORED[variant]), np.random.default_rng(1)
    head = oracle.head_of(config)
    assert head.target_ids is not None and head.lm_head is not None
    ids, aux = rng.integers(0, VOCAB, (2, TOKENS)), rng.normal(size=(2, TOKENS, config.aux_size)).astype(np.float32)
    embedding, anchors = rng.normal(size=(VOCAB, 32)).astype(np.float32), np.array([[2, 17], [9, 12]])
    logits = rng.normal(size=(2, TOKENS, config.draft_vocab_size)).astype(np.float32)
    counts, reachable = rng.random((2, TOKENS)) < 0.8, rng.random((2, TOKENS)) < 0.9
    best = np.asarray(head.target_ids)[logits.argmax(-1)].astype(np.int32)
    teacher = Teacher(jnp.asarray(aux), jnp.asarray(logits), jnp.asarray(best), jnp.asarray(reachable))
    places = jnp.asarray(ids, jnp.int32), jnp.asarray(counts), jnp.asarray(anchors, jnp.int32)
    found = fast_jit(
        lambda head, teacher: block_scores(config, head, jnp.asarray(embedding), teacher, *places, LOSSES["kl"])
    )(head, teacher)
    expected = np.zeros((config.drafted, 4))
    for b, row in enumerate(anchors.tolist()):
        for root in row:
            embedded = embedding[[ids[b, root], *[config.mask_token_id] * (BLOCK - 1)]]
            out = oracle.block(config, head, oracle.features(config, head, aux[b, :root].astype(np.float64)), embedded)
            state = np.zeros(config.markov_rank)
            for step, hidden in enumerate(out[0 if config.sample_from_anchor else 1 :]):
                if root + step >= TOKENS:
                    continue
                before = int(ids[b, root + step])
                q, state = oracle.next_logits(config, head, hidden, before, state)
                p = logits[b, root + step].astype(np.float64)
                if counts[b, root + step]:
                    expected[step] += scores(p, q, bool(reachable[b, root + step]))
                    if config.confidence != "none":
                        estimate = oracle.confidence(config, head, hidden, before)
                        share = np.minimum(softmax(p), softmax(q)).sum() * reachable[b, root + step]
                        expected[step, 3] -= share * np.log(estimate) + (1 - share) * np.log(1 - estimate)
    got = [[float(part) for part in score if part is not None] for score in found]
    np.testing.assert_allclose(got, expected[:, : len(got[0])], atol=1e-3)  # float32 sums
    assert len(found) == config.drafted and expected[:, 2].all()
    assert len(got[0]) == (3 if config.confidence == "none" else 4)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def scores(p: np.ndarray, q: np.ndarray, reachable: bool) -> list[float]:
    """Divergence, hit and count of one drafted token of these logits."""
    divergence = np.sum(softmax(p) * (np.log(softmax(p)) - np.log(softmax(q))))
    return [divergence * reachable, float(reachable and p.argmax() == q.argmax()), 1.0, 0.0]


def test_an_estimate_is_trained_towards_the_overlap_which_it_does_not_change() -> None:
    """The gradient of its loss in a logit is estimate - sum min(p, q); none goes into the drafted distribution."""
    rng = np.random.default_rng(2)
    p, q, z = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (9, 9, 1))
    overlap = np.minimum(softmax(np.asarray(p)), softmax(np.asarray(q))).sum()
    np.testing.assert_allclose(acceptance(p, q), overlap, rtol=1e-5)
    slope = jax.grad(lambda z: binary_cross_entropy(z, acceptance(p, q))[0])(z)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-np.asarray(z))) - overlap, rtol=1e-4)
    config = dataclasses.replace(BASE, **VARIANTS["confidence alone"])
    head = oracle.head_of(config)
    ids = jnp.asarray(rng.integers(0, VOCAB, (1, TOKENS)), jnp.int32)
    aux = jnp.asarray(rng.normal(size=(1, TOKENS, config.aux_size)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(1, TOKENS, config.draft_vocab_size)), jnp.float32)
    teacher = Teacher(aux, logits, jnp.zeros((1, TOKENS), jnp.int32), jnp.ones((1, TOKENS), bool))
    places = ids, jnp.ones((1, TOKENS), bool), jnp.asarray([[3, 8]], jnp.int32)
    embedding = jnp.asarray(rng.normal(size=(VOCAB, 32)), jnp.float32)

    def estimate_loss(head: Any) -> Any:
        whole = dataclasses.replace(head, target_ids=target_ids)
        found = block_scores(config, whole, embedding, teacher, *places, LOSSES["kl"])
        return sum(score.confidence for score in found)  # pyright: ignore[reportArgumentType, reportReturnType]

    target_ids = head.target_ids
    gradient = fast_jit(jax.grad(estimate_loss))(dataclasses.replace(head, target_ids=None))
    assert not np.any(gradient.lm_head) and np.any(gradient.confidence.weight) and np.any(gradient.norm)
