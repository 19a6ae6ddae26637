"""Speculative against plain decoding of the same prompts, and a budget against exact speculation: interleaved in one
process."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Literal

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.runtime.results import RunResult

REPEATS = 5


@dataclasses.dataclass
class SpeedUp:
    """Ratio of tokens per second: median, and over all repeats the lowest and highest."""

    median: float
    min: float
    max: float


@dataclasses.dataclass
class Comparison:
    """Tokens per second of all ways (medians), and how they compare. `same_tokens` is the share of tokens up to the
    first that differs from plain decoding's: agreement, where a budget is lossy; None where tokens are drawn, and
    differ by right. The exact figures are None without a budget."""

    repeats: int
    plain_tokens_per_s: float
    exact_tokens_per_s: float | None
    tokens_per_s: float
    over_plain: SpeedUp
    over_exact: SpeedUp | None
    same_tokens: float | None


def compare(
    generate: Callable[..., RunResult],
    tree: TreeConfig | Literal["default"] | None,
    budget: BudgetConfig | None,
    repeats: int = REPEATS,
) -> Comparison:
    """Decode in all ways in turn; the first turn warms up and does not count."""
    plain, exact, asked = [], [], []
    for _ in range(repeats + 1):
        plain.append(generate(tree=None, budget=None, simulate_accept_length=None))
        if budget is not None:
            exact.append(generate(tree=tree, budget=None))
        asked.append(generate(tree=tree, budget=budget))
    own = asked[-1].greedy and asked[-1].simulated_accept_length is None
    return Comparison(
        repeats=repeats,
        plain_tokens_per_s=_median(plain),
        exact_tokens_per_s=_median(exact) if exact else None,
        tokens_per_s=_median(asked),
        over_plain=_speed_up(asked, plain),
        over_exact=_speed_up(asked, exact) if exact else None,
        same_tokens=agreement(*(_tokens(runs[-1]) for runs in (plain, asked))) if own else None,
    )


def _median(runs: list[RunResult]) -> float:
    return statistics.median(run.tokens_per_s for run in runs[1:])


def _speed_up(runs: list[RunResult], base: list[RunResult]) -> SpeedUp:
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(runs[1:], base[1:], strict=True) if b.tokens_per_s]
    return SpeedUp(statistics.median(ratios) if ratios else 0.0, min(ratios, default=0.0), max(ratios, default=0.0))


def agreement(plain: list[list[int]], other: list[list[int]]) -> float:
    """Share of the plain tokens before the first that differs, over all sequences."""
    same = total = 0
    for a, b in zip(plain, other, strict=True):
        total += len(a)
        differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        same += differ[0] if differ else min(len(a), len(b))
    return same / total


def _tokens(run: RunResult) -> list[list[int]]:
    return [prompt.token_ids for prompt in run.prompts]
