"""Speed of the requested decoding over plain decoding, under a budget over exact speculation and, where every round
chooses its shape, over the tree that is fastest by the costs.

All are run in turn in one process on the same prompts.
"""

import dataclasses
import statistics
from collections.abc import Callable

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.runtime.results import RunResult

REPEATS = 5


@dataclasses.dataclass
class SpeedUp:
    """Ratio of tokens per second: median, minimum and maximum over the repeats."""

    median: float
    min: float
    max: float


@dataclasses.dataclass
class Comparison:
    """Speed of plain decoding, of exact speculation and of the requested spec.

    Fields:
        repeats: number of runs of each.
        plain_tokens_per_s: median of plain decoding.
        exact_tokens_per_s: median of exact speculation; None without a budget.
        tokens_per_s: median of the requested spec.
        over_plain: speed-up of the requested spec over plain decoding.
        over_exact: the same over exact speculation; None without a budget.
        fixed: tree that gains most tokens a second by the costs, where every round chooses its shape; else None.
        fixed_tokens_per_s, over_fixed: of that tree in every round.
        same_tokens: share of plain decoding's tokens before the first difference; None where they are simulated.
    """

    repeats: int
    plain_tokens_per_s: float
    exact_tokens_per_s: float | None
    tokens_per_s: float
    over_plain: SpeedUp
    over_exact: SpeedUp | None
    same_tokens: float | None
    fixed: str | None = None
    fixed_tokens_per_s: float | None = None
    over_fixed: SpeedUp | None = None


def compare(
    generate: Callable[..., RunResult],
    spec: DecodingSpec,
    repeats: int = REPEATS,
) -> Comparison:
    """Decode plainly, exactly and as requested, in turn; the first turn warms up and is not counted."""
    plain, exact, requested, every_round = [], [], [], []
    fixed = _best_tree(generate(tree=spec.tree, budget=spec.budget)) if spec.chooses else None
    for _ in range(repeats + 1):
        plain.append(generate(tree=None, budget=None, simulate_accept_length=None))
        if spec.budget is not None:
            # A profile's costs are those of rounds under its budget.
            exact.append(generate(tree="auto" if spec.chooses else spec.tree, budget=None))
        requested.append(generate(tree=spec.tree, budget=spec.budget))
        if fixed is not None:
            every_round.append(generate(tree=fixed, budget=spec.budget))
    comparable = requested[-1].simulated_accept_length is None
    return Comparison(
        repeats=repeats,
        plain_tokens_per_s=_median(plain),
        exact_tokens_per_s=_median(exact) if exact else None,
        tokens_per_s=_median(requested),
        over_plain=_speed_up(requested, plain),
        over_exact=_speed_up(requested, exact) if exact else None,
        same_tokens=agreement(*(_tokens(runs[-1]) for runs in (plain, requested))) if comparable else None,
        fixed=None if fixed is None else fixed.name,
        fixed_tokens_per_s=_median(every_round) if every_round else None,
        over_fixed=_speed_up(requested, every_round) if every_round else None,
    )


def _best_tree(run: RunResult) -> TreeConfig | None:
    """Find the tree of a menu that gains most tokens a second by the costs; None without costs."""
    if run.choice is None or run.choice["round_s"] is None:
        return None
    costs, gains = run.choice["round_s"], run.choice["gains"]
    best = max((name for name in costs if name != "plain"), key=lambda name: gains[name] / costs[name])
    return TreeConfig.of_name(best)


def agreement(plain: list[list[int]], other: list[list[int]]) -> float:
    """Compute the share of plain decoding's tokens before the first difference, over all sequences."""
    same = total = 0
    for a, b in zip(plain, other, strict=True):
        total += len(a)
        differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        same += differ[0] if differ else min(len(a), len(b))
    return same / total


def _median(runs: list[RunResult]) -> float:
    return statistics.median(run.tokens_per_s for run in runs[1:])


def _speed_up(runs: list[RunResult], base: list[RunResult]) -> SpeedUp:
    ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(runs[1:], base[1:], strict=True) if b.tokens_per_s]
    return SpeedUp(statistics.median(ratios) if ratios else 0.0, min(ratios, default=0.0), max(ratios, default=0.0))


def _tokens(run: RunResult) -> list[list[int]]:
    return [prompt.token_ids for prompt in run.prompts]
