"""Fidelity of verification under a budget: its divergence from the exact target over texts, with intervals."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.drafter import SpeculationState
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.teacher_forcing import ForcedStats, log_probabilities, teacher_force
from moespec_jax.runtime.model import Model
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
        at_most = jnp.int32(self.model.config.num_experts if most is None else most)
        run = partial(self.model.programs.run, teacher_force, method, self.model.speculative_params)
        parts = [jax.tree.map(np.asarray, run(state, exact, at_most)) for state, exact in self._parts]
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)

    def _begun(
        self, texts: Sequence[Sequence[int]], prompts: Sequence[int], longest: int
    ) -> tuple[SpeculationState[Any], Array]:
        """Prefill the prompts; also compute the exact log-probabilities of the texts in one plain pass."""
        begun = [list(text[:prompt]) for text, prompt in zip(texts, prompts, strict=True)]
        batch = Batch(begun, [longest] * len(texts), (), 0)
        run = Run(self.model.programs, self._method, self.model.speculative_params, batch)
        state = with_texts(run.state_after(0), texts, prompts)
        tokens, target = state.decoding.tokens[:, :longest], self._method.target
        return state, self.model.programs.run(log_probabilities, target, self.model.params, tokens)


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
    state: SpeculationState[Any], texts: Sequence[Sequence[int]], prompts: Sequence[int]
) -> SpeculationState[Any]:
    """Replace the token drawn after prefill by the text's own, and append the rest of the text."""
    tokens = np.zeros(state.decoding.tokens.shape, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    length = np.array([prompt + 1 for prompt in prompts], np.int32)
    limit = np.array([len(text) for text in texts], np.int32)
    decoding = dataclasses.replace(
        state.decoding,
        tokens=jnp.asarray(tokens),
        length=jnp.asarray(length),
        limit=jnp.asarray(limit),
        done=jnp.asarray(length >= limit),
    )
    return dataclasses.replace(state, decoding=decoding)
