"""Penalties and processors: the logits they make, against plain Python and transformers; and that speculation draws the
tokens of plain decoding under them, since every node is penalised by its own path."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from driver import cached_logits, fast_jit
from speculation import FastPrograms, decode, plainly, speculating
from test_speculate import CHAIN, PROMPTS, SMALL, pair

from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.history import History
from moespec_jax.decoding.sampling import SamplingConfig, processed
from moespec_jax.runtime.run import Batch, Run

VOCAB = 16


def python_logits(sampling: SamplingConfig, logits: list[float], tokens: list[int], prompt_length: int) -> list[float]:
    """Penalised logits after some tokens, one token of the vocabulary after another."""
    new = []
    for token, value in enumerate(logits):
        if token in tokens:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        count = tokens[prompt_length:].count(token)
        value -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
        new.append(value)
    return new


def never_again(history: History, logits: Any) -> Any:
    """A processor of tokens and length: the last two tokens are not drawn again, token 3 at even places only."""
    last = jnp.take(history.tokens, jnp.maximum(history.length - 1 - jnp.arange(2), 0))
    token = jnp.arange(logits.shape[0])
    forbidden = (token[:, None] == last[None, :]).any(axis=1) | ((token == 3) & (history.length % 2 == 1))
    return jnp.where(forbidden, -1e9, logits.astype(jnp.float32))


PENALTIES: dict[str, SamplingConfig] = {
    "repetition": SamplingConfig(repetition_penalty=1.7),
    "encouraged": SamplingConfig(repetition_penalty=0.6),
    "presence": SamplingConfig(presence_penalty=1.5),
    "frequency": SamplingConfig(frequency_penalty=0.7, temperature=0.8),
    "all, sampled": SamplingConfig(1.0, 9, 0.95, 0.02, 1.3, 0.4, -0.2),
    "processor": SamplingConfig(temperature=0.9, logits_processor=never_again),
    "processor and penalty": SamplingConfig(repetition_penalty=1.4, logits_processor=never_again),
}


@pytest.mark.parametrize("name", [name for name in PENALTIES if "processor" not in name])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_plain_python(name: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    for length, prompt_length in ((1, 1), (6, 2), (12, 12), (12, 1)):
        tokens = rng.integers(0, VOCAB, 12)
        logits = jnp.asarray(rng.normal(size=VOCAB) * 3, dtype)
        history = History(jnp.asarray(tokens, jnp.int32), jnp.int32(length), jnp.int32(prompt_length))
        actual = processed(PENALTIES[name], logits, history)
        exact = logits.astype(jnp.float32).tolist()
        expected = python_logits(PENALTIES[name], exact, tokens[:length].tolist(), prompt_length)
        np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-6, atol=1e-6)  # float32 against Python


@pytest.mark.torch
def test_a_repetition_penalty_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    tokens = [4, 4, 9, 0]
    history = History(jnp.asarray([*tokens, 7], jnp.int32), jnp.int32(4), jnp.int32(2))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), torch.tensor(logits)[None])[0]
    actual = processed(SamplingConfig(repetition_penalty=1.3), jnp.asarray(logits), history)
    np.testing.assert_allclose(np.asarray(actual), theirs.numpy(), rtol=1e-6)


@pytest.mark.slow_except("chain-all, sampled")
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("tree", ["16/4/4", "chain"])
def test_speculation_draws_the_tokens_of_plain_decoding(tree: str, name: str) -> None:
    """Three sequences, in one call and one round a call; and under a budget of all experts."""
    new, sampling, shape = 60, PENALTIES[name], SMALL if tree == "16/4/4" else CHAIN
    plain = decode(plainly(*pair()[:3], sampling), FastPrograms(), PROMPTS, new).sequences
    unpenalised = SamplingConfig(*[getattr(sampling, field) for field in ("temperature", "top_k", "top_p", "min_p")])
    assert plain != decode(plainly(*pair()[:3], unpenalised), FastPrograms(), PROMPTS, new).sequences
    decoding, programs = speculating(*pair(), shape, sampling), FastPrograms()
    run = decode(decoding, programs, PROMPTS, new)
    assert run.sequences == plain and run.accepted.sum() > 5
    pieces = Run(programs, *decoding, Batch(PROMPTS, [len(p) + new for p in PROMPTS], (), 0))
    pieces.execute(on_round=lambda number, info: None)
    assert pieces.sequences == plain
    config = pair()[0]
    all_experts = resolve(BudgetConfig(config.num_experts), config)
    budgeted = speculating(*pair(), shape, sampling)
    object.__setattr__(budgeted.method, "budget", all_experts)
    assert decode(budgeted, FastPrograms(), PROMPTS, new).sequences == plain


def test_every_greedy_token_is_the_largest_penalised_logit() -> None:
    """In plain Python, from one pass over the whole text that was generated."""
    sampling, new = SamplingConfig(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2), 30
    config, params, backend, *_ = pair()
    run = decode(speculating(*pair(), CHAIN, sampling), FastPrograms(), PROMPTS, new)
    for ids, prompt in zip(run.sequences, PROMPTS, strict=True):
        logits = cached_logits(config, params, backend, np.array([ids], np.int32))[0].astype(np.float64)
        for place in range(len(prompt), len(ids)):
            row = python_logits(sampling, logits[place - 1].tolist(), ids[:place], len(prompt))
            assert ids[place] == int(np.argmax(row))


def test_without_penalties_no_history_is_read() -> None:
    """The compiled draw of a plain setting has no scatter: the buffer of tokens costs nothing."""
    history = History(jnp.zeros((8,), jnp.int32), jnp.int32(3), jnp.int32(1))
    draws = {
        name: fast_jit(lambda row, history, s=setting: processed(s, row, history)).lower(jnp.zeros(VOCAB), history)
        for name, setting in {"plain": SamplingConfig(0.7), "penalised": SamplingConfig(repetition_penalty=1.1)}.items()
    }
    assert "scatter" not in draws["plain"].as_text() and "scatter" in draws["penalised"].as_text()
