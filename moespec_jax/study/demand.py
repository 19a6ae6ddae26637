"""Experts that the tokens of a tree need together: their number, and how unevenly router probability is distributed."""

import numpy as np
from jaxtyping import Float, Int

from moespec_jax.study.routing import TreeRouting


def unions(routing: TreeRouting) -> Int[np.ndarray, "layers trees sizes"]:
    """Count the distinct experts of the trees of 1, 2, ... nodes that the same drafts make.

    A tree keeps the best-scored nodes of its pool, at every size, and no node scores higher than its parent. So the
    smaller trees of equal depth and top-k consist of this one's best-scored nodes.
    """
    best = np.argsort(-routing.scores, axis=1, kind="stable")
    return np.stack([_unions(layer, best, routing.probabilities.shape[-1]) for layer in routing.experts])


def uniform_union(experts: int, active: int, nodes: Int[np.ndarray, " sizes"]) -> Float[np.ndarray, " sizes"]:
    """Compute the expected number of distinct experts if n nodes chose k of N uniformly: N (1 - (1 - k/N)^n)."""
    return experts * (1 - (1 - active / experts) ** nodes)


def kept_mass(routing: TreeRouting) -> Float[np.ndarray, "layers trees experts"]:
    """Compute the share of a tree's summed router probability that its 1, 2, ... heaviest experts have."""
    sums = routing.probabilities.sum(axis=2, dtype=np.float64)
    kept = np.cumsum(-np.sort(-sums, axis=-1), axis=-1)
    return kept / kept[..., -1:]


def least_budget(mass: Float[np.ndarray, "*curves experts"], share: float = 0.9) -> Int[np.ndarray, "*curves"]:
    """Find the smallest number of experts that keep `share` of the mass."""
    return np.asarray(1 + (mass < share).sum(axis=-1))  # an array too where there is one curve


def _unions(chosen: np.ndarray, best: np.ndarray, experts: int) -> np.ndarray:
    ranked = np.take_along_axis(chosen, best[:, :, None], axis=1)
    selected = np.zeros((*ranked.shape[:2], experts), bool)
    np.put_along_axis(selected, ranked, True, axis=2)
    return np.logical_or.accumulate(selected, axis=1).sum(axis=2)
