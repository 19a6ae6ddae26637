"""Blocks of a DFlash head in training are the blocks of decoding, in NumPy."""

import dataclasses

import dflash_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from dflash_oracle import BASE, BLOCK, VARIANTS, VOCAB
from driver import fast_jit

from moespec_jax.train.blocks import block_outputs, block_scores
from moespec_jax.train.objective import LOSSES, Teacher

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


@pytest.mark.slow_except("False")
@pytest.mark.parametrize("from_anchor", [False, True])
def test_scores_compare_each_drafted_token_with_the_target_s(from_anchor: bool) -> None:
    """Row by row: the token drafted at depth j is that of the target's row j tokens behind the anchor."""
    config, rng = dataclasses.replace(BASE, sample_from_anchor=from_anchor), np.random.default_rng(1)
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
    expected = np.zeros((config.drafted, 3))
    for b, row in enumerate(anchors.tolist()):
        for root in row:
            embedded = embedding[[ids[b, root], *[config.mask_token_id] * (BLOCK - 1)]]
            out = oracle.block(config, head, oracle.features(config, head, aux[b, :root].astype(np.float64)), embedded)
            for step, hidden in enumerate(out[0 if from_anchor else 1 :]):
                if root + step >= TOKENS or not counts[b, root + step]:
                    continue
                expected[step, 2] += 1
                if reachable[b, root + step]:
                    q = np.asarray(head.lm_head, np.float64) @ hidden
                    p = logits[b, root + step].astype(np.float64)
                    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (p, q))
                    expected[step, 0] += np.sum(np.exp(log_p) * (log_p - log_q))
                    expected[step, 1] += p.argmax() == q.argmax()
    np.testing.assert_allclose([list(map(float, score)) for score in found], expected, atol=1e-3)  # float32 sums
    assert len(found) == config.drafted and expected[:, 2].all()
