"""What tokens together demand of a layer's experts: how many, and how unevenly."""

import numpy as np
from jaxtyping import Float, Int

from moespec_jax.study.routing import TreeRouting


def unions(routing: TreeRouting) -> Int[np.ndarray, "layers trees sizes"]:
    """Distinct experts of the trees of 1, 2, ... nodes that would have been drafted in place of each.

    A tree keeps the best-scored nodes of its pool, whatever their number; parents are never below their children. So
    the smaller trees of equal depth and top-k are this one's best nodes.
    """
    best = np.argsort(-routing.scores, axis=1, kind="stable")
    return np.stack([_unions(layer, best, routing.probabilities.shape[-1]) for layer in routing.experts])


def uniform_union(experts: int, active: int, nodes: Int[np.ndarray, " sizes"]) -> Float[np.ndarray, " sizes"]:
    """Distinct experts expected of so many nodes if each chose its `active` experts by lot: N (1 - (1 - k/N)^n)."""
    return experts * (1 - (1 - active / experts) ** nodes)


def kept_mass(routing: TreeRouting) -> Float[np.ndarray, "layers trees experts"]:
    """The share of a tree's summed router probability that its 1, 2, ... heaviest experts hold."""
    sums = routing.probabilities.sum(axis=2, dtype=np.float64)
    held = np.cumsum(-np.sort(-sums, axis=-1), axis=-1)
    return held / held[..., -1:]


def least_budget(mass: Float[np.ndarray, "*curves experts"], share: float = 0.9) -> Int[np.ndarray, "*curves"]:
    """The fewest experts that hold a share of the mass."""
    return 1 + (mass < share).sum(axis=-1)


def _unions(chosen: np.ndarray, best: np.ndarray, experts: int) -> np.ndarray:
    ranked = np.take_along_axis(chosen, best[:, :, None], axis=1)
    hit = np.zeros((*ranked.shape[:2], experts), bool)
    np.put_along_axis(hit, ranked, True, axis=2)
    return np.logical_or.accumulate(hit, axis=1).sum(axis=2)
