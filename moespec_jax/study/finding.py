"""Comparison of rules: the best one, and by how much, with confidence intervals. Texts are compared in pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moespec_jax.measure.fidelity import DRAWS

# Divergences of every text under a rule, one array for each set.
ByText = Sequence[np.ndarray]


class Contrast(NamedTuple):
    """Mean divergences of two rules over the same texts, with 95 % bootstrap intervals over texts.

    Fields:
        kl: divergence of the first rule, in nats.
        kl_against: divergence of the second.
        difference: `kl_against - kl`.
        difference_95: its interval.
        times: `kl_against / kl`; None where `kl` is 0.
        times_95: its interval.
        texts: number of texts.
    """

    kl: float
    kl_against: float
    difference: float
    difference_95: tuple[float, float]
    times: float | None
    times_95: tuple[float, float] | None
    texts: int

    @property
    def significant(self) -> bool:
        """True where the interval of the difference excludes 0."""
        return self.difference_95[0] > 0 or self.difference_95[1] < 0


class Standing(NamedTuple):
    """Ranking of rules at one budget.

    Fields:
        best: rule with the least divergence.
        runner_up: the next; None if there is no other rule.
        against_paper: the best against MoE-Spec's own rule.
        against_runner_up: the best against the next.
    """

    best: str
    runner_up: str | None
    against_paper: Contrast
    against_runner_up: Contrast | None


def contrast(one: ByText, other: ByText) -> Contrast:
    """Compare two rules over the same texts of several sets, which have equal weight.

    The bootstrap draws texts within each set, the same for both rules.
    """
    first, second = _drawn_means(one), _drawn_means(other)
    kl, against = _mean(one), _mean(other)
    times, times_95 = None, None
    if kl > 0 and (first > 0).all():
        times, times_95 = against / kl, _middle(second / first)
    return Contrast(kl, against, against - kl, _middle(second - first), times, times_95, sum(map(len, one)))


def contrast_row(found: Contrast) -> dict[str, Any]:
    """Columns of a table for a contrast."""
    low, high = found.times_95 or (None, None)
    columns = {
        "kl": found.kl,
        "kl_against": found.kl_against,
        "difference": found.difference,
        "difference_low": found.difference_95[0],
        "difference_high": found.difference_95[1],
        "times": found.times,
        "times_low": low,
        "times_high": high,
    }
    return {k: None if v is None else round(v, 6) for k, v in columns.items()} | {"texts": found.texts}


def mean_interval(by_text: ByText) -> tuple[float, float]:
    """Compute the 95 % interval of the mean over sets, from the same bootstrap draws."""
    return _middle(_drawn_means(by_text))


def standing(divergences: Mapping[str, ByText], paper: str, among: Sequence[str]) -> Standing:
    """Rank the rules `among` by divergence. There is at least one; `paper` need not be one of them."""
    ranked = sorted(among, key=lambda rule: _mean(divergences[rule]))
    best, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    return Standing(
        best,
        runner_up,
        contrast(divergences[best], divergences[paper]),
        None if runner_up is None else contrast(divergences[best], divergences[runner_up]),
    )


def standing_sentence(found: Standing, paper: str) -> str:
    """State a standing in words."""
    c = found.against_paper
    if found.best == paper:
        first = f"MoE-Spec's own rule is best, and diverges {nats(c.kl)} from the exact target."
    else:
        first = f"“{found.best}” is best, and diverges {nats(c.kl)} from the exact target: {more(c)}."
    if found.against_runner_up is None:
        return first
    c = found.against_runner_up
    doubt = "" if c.significant else "; these texts do not distinguish the two"
    return (
        f"{first} The next, “{found.runner_up}”, diverges {nats(c.difference)} more ({_span(c.difference_95)}){doubt}."
    )


def more(found: Contrast) -> str:
    """State in words how much more MoE-Spec's own rule, the second of a contrast, diverges."""
    difference = f"{nats(found.difference)} more ({_span(found.difference_95)})"
    if found.times is None or found.times_95 is None:
        return f"MoE-Spec's own rule diverges {difference}"
    return f"MoE-Spec's own rule diverges {found.times:.1f} times as much ({_span(found.times_95, 1)}), {difference}"


def nats(value: float) -> str:
    """Format a divergence; rounded to six digits first, as in the tables."""
    return f"{round(value, 6):.4f} nats"


def _drawn_means(by_text: ByText) -> np.ndarray:
    """Draw texts `DRAWS` times, equally for every rule; returns the mean over sets of each draw."""
    random = np.random.default_rng(0)
    draws = [values[random.integers(0, len(values), (DRAWS, len(values)))].mean(axis=1) for values in by_text]
    return np.mean(draws, axis=0)


def _mean(by_text: ByText) -> float:
    return float(np.mean([values.mean() for values in by_text]))


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _span(bounds: tuple[float, float], digits: int = 4) -> str:
    return f"95 %: {bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"
