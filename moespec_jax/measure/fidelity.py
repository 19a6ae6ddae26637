"""How close verification under a budget stays to the exact target: figures over texts, with their uncertainty."""

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
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import SpeculationSettings, SpeculationState
from moespec_jax.measure.teacher_forcing import Followed, follow, log_probabilities
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

DRAWS = 2000


class Texts:
    """Texts to follow with one tree, each from the end of its prompt on.

    Args:
        model: target and draft head.
        tree: what is drafted in each round.
        texts: token ids, each longer than its prompt by at least two.
        prompts: how many of the first tokens of each are read as a prompt, exactly.
        batch: how many are followed side by side, for the memory they take; None is all of them. Each is a batch of its
            own to a budget all the same; only score `depth` counts what others committed.
    """

    def __init__(
        self,
        model: Model,
        tree: TreeConfig,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[int],
        batch: int | None = None,
    ):
        self._method = model.method(SamplingConfig(), tree)
        self.model, self.texts, self.prompts = model, texts, prompts
        every = len(texts) if batch is None else batch
        parts = [slice(first, first + every) for first in range(0, len(texts), every)]
        longest = max(len(text) for text in texts)
        self._parts = [self._begun(texts[part], prompts[part], longest) for part in parts]

    def follow(self, rule: BudgetConfig | None = None, bound: int | None = None) -> Followed:
        """All texts to their ends: exactly, or under a rule, which `bound` lowers to so many experts. Compiled once a
        rule, whatever the bound: give the rule all experts."""
        settings = self._method.settings
        assert isinstance(settings, SpeculationSettings)
        settings = settings._replace(budget=None if rule is None else resolve(rule, self.model.config))
        at_most = jnp.int32(self.model.config.num_experts if bound is None else bound)
        run = partial(self.model.programs.run, follow, settings, self._method.params)
        parts = [jax.tree.map(np.asarray, run(state, exact, at_most)) for state, exact in self._parts]
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)

    def _begun(
        self, texts: Sequence[Sequence[int]], prompts: Sequence[int], longest: int
    ) -> tuple[SpeculationState, Array]:
        """After prefill, and the log-probabilities of a plain pass."""
        begun = [list(text[:prompt]) for text, prompt in zip(texts, prompts, strict=True)]
        batch = Batch(begun, [longest] * len(texts), (), 0)
        state = with_texts(Run(self.model.programs, self._method, batch).state_after(0), texts, prompts)
        tokens = state.decoding.tokens[:, :longest]
        settings = self._method.settings
        return state, self.model.programs.run(log_probabilities, settings, self.model.params, tokens)


def summary(followed: Followed) -> dict[str, Any]:
    """Means over positions within each text, then over texts, with 95 % of a bootstrap over texts; the texts' own
    means under `..._by_text`, to be compared text by text. `perplexity` is that of all positions together."""
    rounds = followed.rounds.sum()
    found: dict[str, Any] = {}
    for name, values in {"kl": followed.kl, "top1": followed.same, "nll": -followed.log_probability}.items():
        by_text = np.nanmean(values, axis=1)
        found[name] = round(float(by_text.mean()), 6)
        found[f"{name}_95"] = interval(by_text)
        found[f"{name}_by_text"] = by_text.round(6).tolist()
    by_depth = followed.committed.sum(axis=0) / rounds
    return found | {
        "perplexity": round(float(np.exp(np.nanmean(-followed.log_probability))), 5),
        "positions": int(np.isfinite(followed.kl).sum()),
        "rounds": int(rounds),
        "accept_length": round(1 + float(by_depth.sum()), 3),
        "accepted_by_depth": by_depth.round(4).tolist(),
        "experts_wanted": round(float(followed.wanted.sum() / rounds), 2),
        "experts_read": round(float(followed.read.sum() / rounds), 2),
        "tokens_replaced": round(float(followed.replaced.sum() / rounds), 4),
    }


def interval(by_text: np.ndarray, share: float = 0.95) -> list[float]:
    """Bounds of the mean over texts: `share` of a bootstrap that draws texts, the same draws in every call."""
    drawn = np.random.default_rng(0).integers(0, len(by_text), (DRAWS, len(by_text)))
    outside = 50 * (1 - share)
    return np.percentile(by_text[drawn].mean(axis=1), [outside, 100 - outside]).round(6).tolist()


def with_texts(state: SpeculationState, texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> SpeculationState:
    """After prefill, with the text's next token in place of what was drawn, and the rest behind it to be found."""
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
