"""Experts that the same tokens select together more often than independent choices would."""

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform


def count_pairs(experts: Int[np.ndarray, "tokens active"], count: int) -> Int[np.ndarray, "experts experts"]:
    """Count the tokens that selected both experts of a pair; on the diagonal, those that selected the expert."""
    selected = np.zeros((len(experts), count), np.int64)
    np.put_along_axis(selected, experts, 1, axis=1)
    return selected.T @ selected


def lift(pairs: Int[np.ndarray, "experts experts"]) -> Float[np.ndarray, "experts experts"]:
    """Compute the lift of every pair: how often it was selected, relative to independent choices. The mean is 1; values
    are NaN on the diagonal and where an expert was never selected.

    Independent counts are proportional to the product of both experts' counts, and scaled to the total number of pairs:
    the experts of one token differ, which makes the total smaller than the sum of these products.
    """
    counts = np.diagonal(pairs).astype(np.float64)
    expected = np.outer(counts, counts)
    apart = ~np.eye(len(pairs), dtype=bool)
    expected *= pairs[apart].sum() / max(expected[apart].sum(), 1)
    return np.where(apart & (expected > 0), pairs / np.where(expected > 0, expected, 1), np.nan)


def order(lifted: Float[np.ndarray, "experts experts"]) -> Int[np.ndarray, " experts"]:
    """Order expert ids so that experts selected together are adjacent: average-linkage hierarchical clustering with the
    distance 1 / (1 + lift), NaN counting as 0."""
    distance = 1 / (1 + np.nan_to_num(lifted, nan=0.0))
    np.fill_diagonal(distance, 0.0)
    pairs = squareform(distance, checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(pairs, method="average"), pairs))
