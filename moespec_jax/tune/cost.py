"""What a round takes, as a sum of what it is made of, fitted to a few measured settings.

    round = fixed + depth + 1 passes of the head + depth * top_k rows in them + size rows verified + experts read

Each term has a price that is not negative (non-negative least squares), and errors count relative to what was measured.
The last term is C(nodes, B)'s dependence on the budget: bytes of experts over bandwidth.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from moespec_jax.config import TreeConfig

TERMS = ("fixed", "a pass of the head", "a row in the head", "a row verified", "an expert read in every layer")


class Measured(NamedTuple):
    """One setting that was timed: distinct experts read a layer, seconds a round, and whether a budget was on."""

    tree: TreeConfig
    experts: float
    round_s: float
    budgeted: bool = False


class Cost(NamedTuple):
    """Seconds that each term costs, and the fit's relative errors at what was measured."""

    prices: tuple[float, ...]
    errors: tuple[float, ...]

    def round_s(self, tree: TreeConfig, experts: float) -> float:
        """Predicted seconds of a round that reads so many distinct experts a layer."""
        return float(np.dot(self.prices, terms(tree, experts)))


def terms(tree: TreeConfig, experts: float) -> list[float]:
    """How often a round pays each term."""
    return [1.0, tree.depth + 1.0, float(tree.depth * tree.top_k), float(tree.size), experts]


def fit(measured: Sequence[Measured]) -> Cost:
    """The prices that explain what was measured best.

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
    """Distinct experts that exact trees of each measured size want, to be interpolated between: `np.interp`."""
    by_size: dict[int, list[float]] = {}
    for one in measured:
        by_size.setdefault(one.tree.size, []).append(one.experts)
    return {size: float(np.mean(by_size[size])) for size in sorted(by_size)}
