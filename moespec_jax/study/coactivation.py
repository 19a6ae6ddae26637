"""Which experts are chosen by the same tokens more often than if choices were independent."""

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform


def together(experts: Int[np.ndarray, "tokens active"], count: int) -> Int[np.ndarray, "experts experts"]:
    """How many tokens chose both experts of a pair; on the diagonal, how many chose one."""
    hit = np.zeros((len(experts), count), np.int64)
    np.put_along_axis(hit, experts, 1, axis=1)
    return hit.T @ hit


def lift(pairs: Int[np.ndarray, "experts experts"]) -> Float[np.ndarray, "experts experts"]:
    """How many times as often as independent choices would a pair is chosen: 1 on average, not a number where an expert
    was never chosen and on the diagonal.

    Independent is in proportion to the product of both experts' counts, scaled to as many pairs as there were: experts
    of one token differ, so all pairs together are fewer than that product says.
    """
    counts = np.diagonal(pairs).astype(np.float64)
    expected = np.outer(counts, counts)
    apart = ~np.eye(len(pairs), dtype=bool)
    expected *= pairs[apart].sum() / max(expected[apart].sum(), 1)
    return np.where(apart & (expected > 0), pairs / np.where(expected > 0, expected, 1), np.nan)


def order(lifted: Float[np.ndarray, "experts experts"]) -> Int[np.ndarray, " experts"]:
    """Experts in an order that puts those chosen together beside each other: hierarchical clustering by average
    distance, where the more often a pair is chosen, the nearer it is."""
    near = np.nan_to_num(lifted, nan=0.0)
    distance = 1 / (1 + near)
    np.fill_diagonal(distance, 0.0)
    pairs = squareform(distance, checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(pairs, method="average"), pairs))
