"""Cost model of a round: a linear function of its parts, fitted to a few measured settings.

    seconds = fixed + a (depth + 1) + b depth top_k + c size + d experts

(depth + 1) is the number of passes of the head, depth * top_k the number of rows in them, size the number of verified
rows, and experts the number of distinct experts that a layer reads: bytes over bandwidth, the term that a budget
changes. Prices are not negative (non-negative least squares on relative errors).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from moespec_jax.config import TreeConfig

TERMS = ("fixed", "a pass of the head", "a row in the head", "a row verified", "an expert read in every layer")


class Measured(NamedTuple):
    """Measured setting.

    Fields:
        tree: shape of the draft tree.
        experts: distinct experts that a layer read in a round, mean of rounds.
        round_s: seconds of a round.
        budgeted: whether there was a budget.
    """

    tree: TreeConfig
    experts: float
    round_s: float
    budgeted: bool = False


class Cost(NamedTuple):
    """Fitted cost model.

    Fields:
        prices: seconds of one unit of each of `TERMS`.
        errors: relative error of each measured setting.
    """

    prices: tuple[float, ...]
    errors: tuple[float, ...]

    def round_s(self, tree: TreeConfig, experts: float) -> float:
        """Predict the seconds of a round in which each layer reads `experts` distinct experts."""
        return float(np.dot(self.prices, terms(tree, experts)))


def terms(tree: TreeConfig, experts: float) -> list[float]:
    """Count the units of each of `TERMS` in a round."""
    return [1.0, tree.depth + 1.0, float(tree.depth * tree.top_k), float(tree.size), experts]


def fit(measured: Sequence[Measured]) -> Cost:
    """Fit the prices to measured settings, by relative error.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("expected measured settings to fit a cost to; got none")
    rows = np.array([terms(one.tree, one.experts) for one in measured])
    times = np.array([one.round_s for one in measured])
    prices, _ = nnls(rows / times[:, None], np.ones(len(times)))
    return Cost(tuple(prices.tolist()), tuple((rows @ prices / times - 1).tolist()))


def interpolate_experts(measured: Sequence[Measured]) -> dict[int, float]:
    """Average the distinct experts of exact trees by tree size, ascending, as `np.interp` needs them."""
    by_size: dict[int, list[float]] = {}
    for one in measured:
        by_size.setdefault(one.tree.size, []).append(one.experts)
    return {size: float(np.mean(by_size[size])) for size in sorted(by_size)}
