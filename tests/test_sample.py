"""Distributions against plain Python and transformers; draws that depend on seed, row and position alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from driver import at

from moespec_jax.decoding.sampling import SamplingConfig, arranged_by_scatter, arranged_by_sort, draw, log_probabilities

SETTINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.3),
    SamplingConfig(temperature=2.5, top_k=1),
    SamplingConfig(temperature=0.8, top_k=5),
    SamplingConfig(temperature=1.0, top_k=1000),
    SamplingConfig(temperature=1.0, top_p=1e-6),
    SamplingConfig(temperature=1.7, top_p=0.63),
    SamplingConfig(temperature=0.6, top_k=7, top_p=0.911),
    SamplingConfig(temperature=1.3, min_p=0.13),
    SamplingConfig(temperature=1.0, min_p=1.0),
    SamplingConfig(temperature=1.0, min_p=5e-324),
    SamplingConfig(temperature=1.1, top_k=9, top_p=0.95, min_p=0.07),
]


def some_logits(ties: bool, count: int = 12) -> np.ndarray:
    logits = np.random.default_rng(int(ties)).normal(size=(count, 23)) * 2
    return (np.round(logits) if ties else logits).astype(np.float32)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_distribution_is_the_plain_python_one(sampling: SamplingConfig, ties: bool) -> None:
    logits = some_logits(ties)
    actual = np.exp(np.asarray(log_probabilities(sampling, jnp.asarray(logits))))
    expected = [
        oracles.token_distribution(row.tolist(), sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        for row in logits.astype(np.float64)
    ]
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-12)
    np.testing.assert_array_equal(actual == 0, np.array(expected) == 0)


@pytest.mark.parametrize("arranged", [arranged_by_sort, arranged_by_scatter])
def test_marks_in_any_order_are_arranged_by_id(arranged: Callable[..., jax.Array]) -> None:
    """Both forms equal NumPy's; a CPU runs only one of them in decoding."""
    random = np.random.default_rng(3)
    ids = random.permuted(np.tile(np.arange(37, dtype=np.int32), (4, 1)), axis=1)
    marks = random.random(ids.shape) < 0.4
    expected = np.zeros_like(marks)
    np.put_along_axis(expected, ids, marks, axis=1)
    for row in range(len(ids)):
        np.testing.assert_array_equal(jax.jit(arranged)(marks[row], ids[row]), expected[row])
    np.testing.assert_array_equal(jax.jit(arranged)(marks, ids), expected)


def test_greedy_puts_everything_on_the_first_maximum() -> None:
    logits = some_logits(ties=True)
    probabilities = np.exp(np.asarray(log_probabilities(SamplingConfig(), jnp.asarray(logits))))
    for row, given in zip(probabilities, logits.tolist(), strict=True):
        assert row.tolist() == [float(i == given.index(max(given))) for i in range(23)]
    drawn = draw(SamplingConfig(), jax.random.key(0), jnp.asarray(logits), at(jnp.zeros((12,), jnp.int32)))
    assert drawn.tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.torch
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_distribution_as_in_transformers(sampling: SamplingConfig) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    logits = some_logits(ties=False)
    warpers: list[Any] = [hf.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(hf.MinPLogitsWarper(sampling.min_p))
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(torch.zeros((12, 1), dtype=torch.long), scores)
    actual = np.exp(np.asarray(log_probabilities(sampling, jnp.asarray(logits))))
    np.testing.assert_allclose(actual, scores.softmax(-1).numpy(), rtol=2e-5, atol=1e-12)


def test_bfloat16_logits_are_widened() -> None:
    logits = jnp.asarray(some_logits(ties=False), jnp.bfloat16)
    for sampling in (SamplingConfig(), SETTINGS[7]):
        narrow = log_probabilities(sampling, logits)
        assert narrow.dtype == jnp.float32
        np.testing.assert_array_equal(narrow, log_probabilities(sampling, logits.astype(jnp.float32)))


WARM = SamplingConfig(temperature=1.0, top_k=12)


@pytest.mark.parametrize("sampling", [s for s in SETTINGS if s.top_k != 1 and s.min_p < 1], ids=str)
def test_a_draw_is_the_largest_log_probability_with_the_noise_of_its_place(sampling: SamplingConfig) -> None:
    """In NumPy, with Gumbel noise of the key that docs/how_a_round_works.md writes down."""
    logits = some_logits(ties=True)
    index = np.arange(12, dtype=np.int32) * 5
    drawn = draw(sampling, jax.random.key(7), jnp.asarray(logits), at(jnp.asarray(index))).tolist()
    for sequence, row in enumerate(logits.astype(np.float64)):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), sequence), index[sequence])
        cuts = (sampling.top_k, sampling.top_p, sampling.min_p)
        p = oracles.token_distribution(row.tolist(), sampling.temperature, *cuts)
        with np.errstate(divide="ignore"):
            assert drawn[sequence] == np.argmax(np.log(p) + np.asarray(jax.random.gumbel(key, (23,))))


def test_draws_depend_on_the_seed() -> None:
    logits, index = jnp.zeros((16, 50)), jnp.arange(16, dtype=jnp.int32)
    first, again, other = (draw(WARM, jax.random.key(seed), logits, at(index)).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_row_is_drawn_whatever_its_neighbours() -> None:
    """Neither the neighbours' logits and positions nor their number matter; row and position do."""
    logits, other = jnp.asarray(some_logits(False)), jnp.asarray(some_logits(True))
    index = jnp.arange(12, dtype=jnp.int32) * 3
    key = jax.random.key(5)
    whole = draw(WARM, key, logits, at(index))
    for row in (0, 4, 11):
        mine = jnp.arange(12) == row
        changed = draw(WARM, key, jnp.where(mine[:, None], logits, other), at(jnp.where(mine, index, index + 7)))
        alone = draw(WARM, key, logits[: row + 1], at(index[: row + 1]))
        assert int(changed[row]) == int(alone[row]) == int(whole[row])


def test_rows_and_positions_draw_independently() -> None:
    logits = jnp.zeros((64, 1000))
    here = draw(WARM, jax.random.key(0), logits, at(jnp.zeros((64,), jnp.int32)))
    there = draw(WARM, jax.random.key(0), logits, at(jnp.ones((64,), jnp.int32)))
    assert len(set(here.tolist())) > 48 and np.mean(np.asarray(here) == np.asarray(there)) < 0.1


def test_tokens_come_as_often_as_their_probability_says() -> None:
    """Each of 23 counts within 5 standard deviations: a sound draw fails for about one seed in 200 000."""
    count, sampling = 20_000, SamplingConfig(temperature=1.3, top_k=9, top_p=0.95)
    row = some_logits(ties=False)[0]
    probabilities = np.array(oracles.token_distribution(row.tolist(), 1.3, 9, 0.95))
    logits = jnp.broadcast_to(jnp.asarray(row), (count, 23))
    # An argument: XLA would sort a constant while it compiles.
    drawn = jax.jit(partial(draw, sampling))(jax.random.key(3), logits, at(jnp.zeros((count,), jnp.int32)))
    counts = np.bincount(np.asarray(drawn), minlength=23)
    assert np.all(np.abs(counts - count * probabilities) <= 5 * np.sqrt(count * probabilities * (1 - probabilities)))


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}])
@pytest.mark.parametrize("also", [{}, {"top_k": 3}])
def test_bad_temperatures_are_refused(wrong: dict[str, float], also: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingConfig(**wrong, **also)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan"))])
def test_bad_cuts_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingConfig(**{"temperature": 1.0, name: value})  # type: ignore[arg-type]


# The smallest denormal and normal numbers of float32, numbers that it cannot hold, and others near them.
TINY = [5e-324, 1.4e-45, 1e-39, 1.17e-38, 1.2e-38, 1e-35]


@pytest.mark.parametrize("also", [{}, {"top_k": 4}, {"top_p": 1e-40}, {"min_p": 1e-320}])
def test_a_tiny_temperature_is_greedy(also: dict[str, Any]) -> None:
    logits, index = jnp.asarray(some_logits(ties=False) * 1e3), jnp.arange(12, dtype=jnp.int32)
    greedy = np.exp(np.asarray(log_probabilities(SamplingConfig(), logits)))
    for temperature in (*TINY, 1e-25):
        sampling = SamplingConfig(temperature, **also)
        np.testing.assert_array_equal(np.exp(np.asarray(log_probabilities(sampling, logits))), greedy)
        assert draw(sampling, jax.random.key(1), logits, at(index)).tolist() == greedy.argmax(axis=-1).tolist()


@pytest.mark.parametrize("jitted", [False, True])
def test_a_tiny_top_p_draws_the_most_probable_token(jitted: bool) -> None:
    logits = jnp.asarray(some_logits(ties=True))
    greedy = np.exp(np.asarray(log_probabilities(SamplingConfig(), logits)))
    for top_p in TINY:
        run = partial(log_probabilities, SamplingConfig(temperature=1.0, top_p=top_p))
        np.testing.assert_array_equal(np.exp(np.asarray((jax.jit(run) if jitted else run)(logits))), greedy)


@pytest.mark.parametrize("temperature", [1e30, 3.5e38, 1e39, 1e300])
def test_a_huge_temperature_is_uniform(temperature: float) -> None:
    probabilities = np.exp(np.asarray(log_probabilities(SamplingConfig(temperature), jnp.asarray(some_logits(False)))))
    np.testing.assert_allclose(probabilities, 1 / 23, rtol=1e-5)


@pytest.mark.parametrize("top_p", [1 - 1e-9, 1 - 2**-53])
def test_a_top_p_just_below_one_keeps_all_that_float32_can_tell_apart(top_p: float) -> None:
    logits = jnp.asarray(some_logits(ties=False))
    nearly = np.exp(np.asarray(log_probabilities(SamplingConfig(1.0, top_p=top_p), logits)))
    np.testing.assert_allclose(nearly, np.exp(np.asarray(log_probabilities(SamplingConfig(1.0), logits))), atol=1e-6)
