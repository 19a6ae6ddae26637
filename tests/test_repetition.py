"""Training against repetition loops: rows that repeat a passage, and their loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from moespec_jax.demo.finish_target import LOOP_PERIOD, ends_in_loop
from moespec_jax.demo.repetition import LONGEST, MOST, Batch, loss_with_repetition, repeated

WIDTH = 257


@pytest.mark.parametrize("seed", range(10))
def test_repetitions_are_not_learned_but_the_text_after_them_is(seed: int) -> None:
    text = np.arange(8 * WIDTH, dtype=np.int32).reshape(8, WIDTH)  # every token is there once
    batch = repeated(text, 5, np.random.default_rng(seed))
    for row in range(5):
        tokens = batch.tokens[row]
        back = np.diff(tokens) <= 0  # targets with which a repetition begins
        (period,) = set((1 - np.diff(tokens)[back]).tolist())
        assert 1 <= period <= LONGEST and 1 <= back.sum() <= MOST
        np.testing.assert_array_equal(batch.likely[row], ~back)
        np.testing.assert_array_equal(np.flatnonzero(batch.unlikely[row]), np.flatnonzero(back)[1:])
        # Without the repetitions it is the text, of which some follows after them.
        np.testing.assert_array_equal(np.unique(tokens), text[row, : len(np.unique(tokens))])
        assert WIDTH - 1 - np.flatnonzero(back)[-1] - period > WIDTH // 8
    np.testing.assert_array_equal(batch.tokens[5:], text[5:])
    assert batch.likely[5:].all() and not batch.unlikely[5:].any()


def test_loss_is_cross_entropy_of_text_and_unlikelihood_of_repetitions() -> None:
    random = np.random.default_rng(2)
    log_p = np.log(random.uniform(0.05, 0.95, (3, 11))).astype(np.float32)
    likely = random.random((3, 11)) < 0.6
    unlikely = ~likely & (random.random((3, 11)) < 0.5)
    loss, cross_entropy = loss_with_repetition(jnp.asarray(log_p), Batch(np.zeros((3, 12), np.int32), likely, unlikely))
    np.testing.assert_allclose(cross_entropy, -log_p[likely].mean(), rtol=1e-5)
    total = -log_p[likely].sum() - np.log(1 - np.exp(log_p[unlikely])).sum()
    np.testing.assert_allclose(loss, total / log_p.size, rtol=1e-5)


@pytest.mark.parametrize("period", [1, 7, LOOP_PERIOD])
def test_loops_are_found_by_their_last_tokens(period: int) -> None:
    random = np.random.default_rng(period)
    start, passage = random.integers(0, 10_000, 128).tolist(), random.integers(0, 10_000, period).tolist()
    looped = start + passage * max(3, 17)
    assert ends_in_loop(looped)
    assert not ends_in_loop(start)
    assert not ends_in_loop([*looped, 10_001])
    assert not ends_in_loop(start + passage * 2)
