"""Confidence intervals of a share of correct answers, and a test of the difference between two."""

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import binomtest


class Paired(NamedTuple):
    """Two sets of answers to the same questions.

    Fields:
        both: number of questions that both answer correctly.
        first_only: number that only the first answers correctly.
        second_only: number that only the second answers correctly.
        neither: number that neither answers correctly.
        p: two-sided p-value of McNemar's exact test: the binomial test of `first_only` against `second_only`.
    """

    both: int
    first_only: int
    second_only: int
    neither: int
    p: float


def wilson(right: int, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share of correct answers; 0 to 1 without questions."""
    if count == 0:
        return 0.0, 1.0
    found = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two sets of answers question by question."""
    pairs = list(zip(first, second, strict=True))
    both, one, other, neither = (pairs.count(p) for p in [(True, True), (True, False), (False, True), (False, False)])
    p = float(binomtest(one, one + other).pvalue) if one + other else 1.0
    return Paired(both, one, other, neither, p)
