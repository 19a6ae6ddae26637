"""How sure a count of right answers is, and a difference between two."""

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import binomtest


class Paired(NamedTuple):
    """Two ways of answering the same questions: how many both got right, only the first, only the second, neither; and
    McNemar's exact two-sided p-value, which is that a fair coin decided every question that they differ in."""

    both: int
    first_only: int
    second_only: int
    neither: int
    p: float


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of right answers; 0 to 1 where nothing was asked."""
    if count == 0:
        return 0.0, 1.0
    found = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Of two ways, question by question."""
    pairs = list(zip(first, second, strict=True))
    both, one, other, neither = (pairs.count(p) for p in [(True, True), (True, False), (False, True), (False, False)])
    p = float(binomtest(one, one + other).pvalue) if one + other else 1.0
    return Paired(both, one, other, neither, p)
