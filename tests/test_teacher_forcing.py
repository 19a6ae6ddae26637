"""Texts forced through verifications: exactly it is a plain pass, and under a budget it is what decoding does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from speculation import FastPrograms
from tiny_pair import write_pair

from moespec_jax import BudgetConfig, TreeConfig, load
from moespec_jax.decoding import autoregressive
from moespec_jax.measure.fidelity import Texts, interval, summary
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.runtime.model import Model

TREE, NEW = TreeConfig(2, 3, 8), 14
PROMPTS = [[5, 17, 9, 30, 2], [40, 41, 42, 7, 8, 9, 1], [3, 3, 3, 60]]
TIGHT = BudgetConfig(4, coverage="truncate")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    flags = write_pair(tmp_path_factory.mktemp("pair"), NEW, num_experts=12)
    return dataclasses.replace(load(flags[1], flags[3]), programs=FastPrograms())


def direct(model: Model, text: list[int]) -> np.ndarray:
    """Log-probability of every token after the first, by one pass over the whole text."""

    def log_probabilities(params: Decoder, ids: jax.Array) -> jax.Array:
        positions = jnp.arange(len(text), dtype=jnp.int32)[None, :]
        mask = causal_mask(positions, len(text))
        hidden, _, _ = forward(model.config, params, ids, positions, mask, None, model.backend)
        return jax.nn.log_softmax(unembed(params, hidden), axis=-1)[0]

    log_p = np.asarray(fast_jit(log_probabilities)(model.params, jnp.asarray(text, jnp.int32)[None, :]))
    return np.array([log_p[i, token] for i, token in enumerate(text[1:])])


def random_texts() -> list[list[int]]:
    lengths = (12, 20, 9)
    drawn = np.random.default_rng(1).integers(0, 300, (3, 20)).tolist()
    return [[*p, *row[:n]] for p, row, n in zip(PROMPTS, drawn, lengths, strict=True)]


@pytest.mark.slow
def test_exactly_forced_a_text_has_the_probabilities_of_a_plain_pass(model: Model) -> None:
    texts, prompts = random_texts(), [len(p) for p in PROMPTS]
    stats = Texts(model, TREE, texts, prompts).teacher_force()
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        scored = np.flatnonzero(np.isfinite(stats.log_probability[i]))
        assert scored.tolist() == list(range(prompt, len(text) - 1))
        np.testing.assert_allclose(stats.log_probability[i][scored], direct(model, text)[scored], atol=2e-5)
    assert np.nanmax(np.abs(stats.kl)) < 1e-6 and np.nanmin(stats.same) == 1
    np.testing.assert_array_equal(stats.read, stats.wanted)
    every = Texts(model, TREE, texts, prompts).teacher_force(BudgetConfig(12, score="probability", credit="all"))
    np.testing.assert_array_equal(every.log_probability, stats.log_probability)


@pytest.mark.slow
def test_long_texts_are_read_in_chunks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has the size of all positions and the vocabulary, and the figures are those of one pass."""
    texts, prompts = random_texts(), [len(p) for p in PROMPTS]
    whole = Texts(model, TREE, texts, prompts).teacher_force(TIGHT)
    monkeypatch.setattr(autoregressive, "PREFILL_CHUNK", 16)
    chunked = Texts(model, TREE, texts, prompts, batch=2)
    arrays = jax.tree.leaves([part[1] for part in chunked._parts])
    assert all(array.shape[2:] == (model.config.hidden_size,) for array in arrays) and len(arrays) == 2
    for field, one, other in zip(whole._fields, whole, chunked.teacher_force(TIGHT), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5, err_msg=field)  # rows side by side round differently


@pytest.mark.slow
def test_what_a_budget_wrote_is_forced_in_the_rounds_that_wrote_it(model: Model) -> None:
    """Decoding under a budget and forcing its output under the same budget are one and the same."""
    run = model.generate(PROMPTS[:1], tree=TREE, budget=TIGHT, max_new_tokens=NEW, ignore_eos=True)
    text = [*PROMPTS[0], *run.prompts[0].token_ids]
    forced = Texts(model, TREE, [text], [len(PROMPTS[0])])
    stats = forced.teacher_force(dataclasses.replace(TIGHT, experts=12), 4)
    # The last round may have gone past the end of the text, which forcing does not.
    assert 0 <= stats.rounds[0] - run.prompts[0].rounds <= 1
    figures = summary(stats)
    assert figures["experts_read"] <= 4 < figures["experts_wanted"]
    assert figures["tokens_replaced"] > 0.2 and figures["kl"] > 1e-4


@pytest.mark.slow
def test_texts_side_by_side_do_not_see_each_other(model: Model) -> None:
    texts, prompts = random_texts(), [len(p) for p in PROMPTS]
    budget = BudgetConfig(12, coverage="truncate")
    before = Texts(model, TREE, texts, prompts).teacher_force(budget, 4)
    changed = [texts[0], [9, *texts[1][:-1]], texts[2]]
    after = Texts(model, TREE, changed, prompts).teacher_force(budget, 4)
    for field, was, now in zip(before._fields, before, after, strict=True):
        np.testing.assert_array_equal(was[[0, 2]], now[[0, 2]], err_msg=field)
    assert not np.array_equal(before.kl[1], after.kl[1], equal_nan=True)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Of 400 samples of 30 normal draws, 95 % intervals miss the true mean in 4 % to 10 %: a bootstrap of 30 is a
    little narrow; the bounds are 4 standard deviations of the count around 6.5 %."""
    draws = np.random.default_rng(0).normal(2.0, 1.0, (400, 30))
    missed = sum(not low <= 2.0 <= high for low, high in map(interval, draws))
    assert 6 <= missed <= 46
