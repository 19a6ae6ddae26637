"""Fidelity of verification under a budget: its divergence from the exact target over texts, with intervals."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Array

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.autoregressive import bucket_lengths
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.drafter import SpeculationState
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.measure.teacher_forcing import (
    ExactStates,
    ForcedStats,
    forced_stats_specs,
    log_probabilities,
    teacher_force,
)
from moespec_jax.measure.text_chunks import hidden_states
from moespec_jax.parallel.processes import fetch
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Batch, Run

DRAWS = 2000


class Texts:
    """Texts that are teacher-forced with one tree, each from the end of its prompt.

    Args:
        model: target and draft head.
        tree: shape of the draft tree.
        texts: token ids; a text has at least two tokens more than its prompt.
        prompts: length of the prompt of each text, which is prefilled exactly.
        batch: number of texts that run at once, which bounds the memory; None runs all. It does not change the experts
            that a budget chooses for a text, except by score `depth`, which counts what other texts committed.
    """

    def __init__(
        self,
        model: Model,
        tree: TreeConfig,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[int],
        batch: int | None = None,
    ):
        self._method = model.speculative(DecodingSpec(tree), SamplingConfig())
        self.model, self.texts, self.prompts = model, texts, prompts
        every = len(texts) if batch is None else batch
        parts = [slice(first, first + every) for first in range(0, len(texts), every)]
        longest = max(len(text) for text in texts)
        self._parts = [self._begun(texts[part], prompts[part], longest) for part in parts]

    def teacher_force(self, budget: BudgetConfig | None = None, most: int | None = None) -> ForcedStats:
        """Run all texts to their ends, exactly or under a budget; `most` lowers the budget to that number of experts.

        One program serves all values of `most`: to sweep it, use a budget of all experts.
        """
        resolved = None if budget is None else resolve(budget, self.model.config)
        method = dataclasses.replace(self._method, budget=resolved)
        programs = self.model.programs
        at_most = programs.put(np.array(self.model.config.num_experts if most is None else most, np.int32))
        run = partial(programs.run, teacher_force, method, self.model.speculative_params, specs=forced_stats_specs())
        parts = [
            jax.tree.map(lambda values, count=count: fetch(values)[:count], run(state, exact, at_most))
            for state, exact, count in self._parts
        ]
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)

    def _begun(
        self, texts: Sequence[Sequence[int]], prompts: Sequence[int], longest: int
    ) -> tuple[SpeculationState[Any], Array | ExactStates, int]:
        """Prefill the prompts; also compute the exact log-probabilities of the texts, or the states before them, and
        count the texts, after which a mesh may need finished ones."""
        begun = [list(text[:prompt]) for text, prompt in zip(texts, prompts, strict=True)]
        batch = Batch(begun, [longest] * len(texts), (), 0)
        programs, target, by_text = self.model.programs, self._method.target, cast(Any, BY_SEQUENCE)
        run = Run(programs, self._method, self.model.speculative_params, batch)
        state = with_texts(programs, run.state_after(0), texts, prompts)
        if len(bucket_lengths(longest)) > 1:
            return state, self._exact_states(texts, longest), len(texts)
        tokens = programs.put(fetch(state.decoding.tokens)[:, :longest], BY_SEQUENCE)
        exact = programs.run(log_probabilities, target, self.model.params, tokens, specs=by_text)
        return state, exact, len(texts)

    def _exact_states(self, texts: Sequence[Sequence[int]], longest: int) -> ExactStates:
        """Read texts of more than one chunk as prompts are read: one pass over all, and the log-probabilities of all
        positions, may have no room."""
        prefill = self._method.target.prefill
        chunks = hidden_states(self.model.programs, prefill, self.model.params, texts)
        states = np.concatenate(list(chunks), axis=1)[:, : longest - 1]
        padding = [(0, 0), (0, longest - 1 - states.shape[1]), (0, 0)]
        return ExactStates(self.model.programs.put(np.pad(states, padding), BY_SEQUENCE))


def summary(stats: ForcedStats) -> dict[str, Any]:
    """Average measurements over the positions of each text, then over texts.

    `..._95` are 95 % bootstrap intervals over texts, `..._by_text` the means of each text, for paired comparisons.
    `perplexity` is that of all positions together.
    """
    rounds = stats.rounds.sum()
    found: dict[str, Any] = {}
    for name, values in {"kl": stats.kl, "top1": stats.same, "nll": -stats.log_probability}.items():
        by_text = np.nanmean(values, axis=1)
        found[name] = round(float(by_text.mean()), 6)
        found[f"{name}_95"] = interval(by_text)
        found[f"{name}_by_text"] = by_text.round(6).tolist()
    by_depth = stats.committed.sum(axis=0) / rounds
    return found | {
        "perplexity": round(float(np.exp(np.nanmean(-stats.log_probability))), 5),
        "positions": int(np.isfinite(stats.kl).sum()),
        "rounds": int(rounds),
        "accept_length": round(1 + float(by_depth.sum()), 3),
        "accepted_by_depth": by_depth.round(4).tolist(),
        "experts_wanted": round(float(stats.wanted.sum() / rounds), 2),
        "experts_read": round(float(stats.read.sum() / rounds), 2),
        "tokens_replaced": round(float(stats.replaced.sum() / rounds), 4),
    }


def interval(by_text: np.ndarray, share: float = 0.95) -> list[float]:
    """Compute a bootstrap interval of the mean over texts, with the same draws in every call."""
    drawn = np.random.default_rng(0).integers(0, len(by_text), (DRAWS, len(by_text)))
    outside = 50 * (1 - share)
    return np.percentile(by_text[drawn].mean(axis=1), [outside, 100 - outside]).round(6).tolist()


def with_texts(
    programs: Programs, state: SpeculationState[Any], texts: Sequence[Sequence[int]], prompts: Sequence[int]
) -> SpeculationState[Any]:
    """Replace the token drawn after prefill by the text's own, and append the rest of the text. Sequences after the
    texts, which fill the devices of a mesh, are finished."""
    shape = state.decoding.tokens.shape
    tokens, length, limit = np.zeros(shape, np.int32), np.ones(shape[0], np.int32), np.ones(shape[0], np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    length[: len(texts)] = [prompt + 1 for prompt in prompts]
    limit[: len(texts)] = [len(text) for text in texts]
    given = {"tokens": tokens, "length": length, "limit": limit, "done": length >= limit}
    placed = {name: programs.put(array, BY_SEQUENCE) for name, array in given.items()}
    return dataclasses.replace(state, decoding=dataclasses.replace(state.decoding, **placed))
