"""Training against repetition loops: rows that repeat a passage, and their loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from moespec_jax.demo.finish_target import LOOP_PERIOD, ends_in_loop
from moespec_jax.demo.repetition import DECAY, Batch, loss_with_repetition, repeated

WIDTH = 257


def test_chosen_rows_repeat_a_passage_of_themselves_to_their_end() -> None:
    rows = np.random.default_rng(0).integers(0, 10_000, (8, WIDTH)).astype(np.int32)
    batch = repeated(rows, 5, np.random.default_rng(1))
    for row in range(5):
        begin, period = int(batch.begin[row]), int(batch.period[row])
        end = begin + period
        np.testing.assert_array_equal(batch.tokens[row, :end], rows[row, :end])
        np.testing.assert_array_equal(batch.tokens[row, end:], batch.tokens[row, begin:-period])
    np.testing.assert_array_equal(batch.tokens[5:], rows[5:])
    np.testing.assert_array_equal(batch.period[5:], 0)


def test_loss_is_cross_entropy_of_text_and_a_penalty_of_repetitions() -> None:
    random = np.random.default_rng(2)
    log_p = np.log(random.uniform(0.05, 0.95, (3, 11))).astype(np.float32)
    period, begin = np.array([3, 0, 2], np.int32), np.array([2, 0, 0], np.int32)
    total, text = 0.0, []
    for row in range(3):
        for i in range(11):  # probability of token i + 1
            token = i + 1
            if period[row] == 0 or token < begin[row] + period[row]:
                text.append(-log_p[row, i])
            elif token - period[row] >= 1:
                former = np.exp(log_p[row, i - period[row]])
                total -= np.log(1 - abs(np.exp(log_p[row, i]) - DECAY * former))
    loss, cross_entropy = loss_with_repetition(jnp.asarray(log_p), Batch(np.zeros((3, 12), np.int32), period, begin))
    np.testing.assert_allclose(cross_entropy, np.mean(text), rtol=1e-5)
    np.testing.assert_allclose(loss, (total + np.sum(text)) / log_p.size, rtol=1e-5)


@pytest.mark.parametrize("period", [1, 7, LOOP_PERIOD])
def test_loops_are_found_by_their_last_tokens(period: int) -> None:
    random = np.random.default_rng(period)
    start, passage = random.integers(0, 10_000, 128).tolist(), random.integers(0, 10_000, period).tolist()
    looped = start + passage * max(3, 17)
    assert ends_in_loop(looped)
    assert not ends_in_loop(start)
    assert not ends_in_loop([*looped, 10_001])
    assert not ends_in_loop(start + passage * 2)
