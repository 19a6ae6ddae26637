"""Which rule is best, by how much, and how sure that is: paired comparisons text by text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moespec_jax.measure.fidelity import DRAWS

# Divergences of every text under a rule, one array for each set.
ByText = Sequence[np.ndarray]


class Contrast(NamedTuple):
    """Mean divergences of two rules over the same texts; by how much the first is below the second, in nats and as the
    second's multiple of the first (None where the first is 0), each with 95 % of a bootstrap over texts."""

    kl: float
    kl_against: float
    difference: float
    difference_95: tuple[float, float]
    times: float | None
    times_95: tuple[float, float] | None
    texts: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.difference_95[0] > 0 or self.difference_95[1] < 0


class Standing(NamedTuple):
    """Of some rules at one budget: the best and the one after it, the best's contrast with MoE-Spec's own rule and with
    that runner-up (None where it is alone)."""

    best: str
    runner_up: str | None
    against_paper: Contrast
    against_runner_up: Contrast | None


def contrast(one: ByText, other: ByText) -> Contrast:
    """Two rules over the same texts of several sets, every set counting as much as another.

    The bootstrap draws texts within each set, the same for both rules.
    """
    first, second = _drawn_means(one), _drawn_means(other)
    kl, against = _mean(one), _mean(other)
    times, times_95 = None, None
    if kl > 0 and (first > 0).all():
        times, times_95 = against / kl, _middle(second / first)
    return Contrast(kl, against, against - kl, _middle(second - first), times, times_95, sum(map(len, one)))


def mean_interval(by_text: ByText) -> tuple[float, float]:
    """95 % of the same bootstrap, of the mean over sets."""
    return _middle(_drawn_means(by_text))


def standing(divergences: Mapping[str, ByText], paper: str, among: Sequence[str]) -> Standing:
    """The least divergence among some rules, of which there is at least one; `paper` need not be one of them."""
    ranked = sorted(among, key=lambda rule: _mean(divergences[rule]))
    best, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    return Standing(
        best,
        runner_up,
        contrast(divergences[best], divergences[paper]),
        None if runner_up is None else contrast(divergences[best], divergences[runner_up]),
    )


def standing_sentence(found: Standing, paper: str) -> str:
    """What a standing says, in words."""
    c = found.against_paper
    if found.best == paper:
        said = f"MoE-Spec's own rule is best, and diverges {nats(c.kl)} from the exact target."
    else:
        said = f"“{found.best}” is best, and diverges {nats(c.kl)} from the exact target: {more(c)}."
    if found.against_runner_up is None:
        return said
    c = found.against_runner_up
    sure = "" if c.told_apart else ", which these texts do not tell apart"
    return f"{said} The next, “{found.runner_up}”, diverges {nats(c.difference)} more ({_span(c.difference_95)}){sure}."


def more(found: Contrast) -> str:
    """By how much MoE-Spec's own rule, where it is the second, diverges more, in words."""
    difference = f"{nats(found.difference)} more ({_span(found.difference_95)})"
    if found.times is None or found.times_95 is None:
        return f"MoE-Spec's own rule diverges {difference}"
    return f"MoE-Spec's own rule diverges {found.times:.1f} times as much ({_span(found.times_95, 1)}), {difference}"


def nats(value: float) -> str:
    """As tables say it, which are rounded to six digits before."""
    return f"{round(value, 6):.4f} nats"


def _drawn_means(by_text: ByText) -> np.ndarray:
    """Means over sets of drawn texts: the same draws for every rule."""
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


def contrast_row(found: Contrast) -> dict[str, Any]:
    """As columns of a table."""
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
