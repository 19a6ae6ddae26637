"""The rules of an expert budget as pure functions: how much rows and experts count, which experts come first, how many
are read, and what becomes of the rest. `budget.restrict` applies them.

A budget names a built-in rule by its key in one of the tables below, or gives a function of the same signature.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.nn.routing import Routing


class Nodes(NamedTuple):
    """Rows of a verification before it runs: the nodes of every sequence's draft tree, the root first.

    Fields:
        path_probability: the drafter's probability of the path from the root to a node, 1 for the root.
        depth: steps from the root.
        ancestors: `ancestors[b, i]` marks the nodes on the path from the root to node i, both included.
        acceptance_by_depth: share of all rounds so far that committed a node of each depth, 1 for the root's.
    """

    path_probability: Float[Array, "batch nodes"]
    depth: Int[Array, "batch nodes"]
    ancestors: Bool[Array, "batch nodes nodes"]
    acceptance_by_depth: Float[Array, " depths"]


# Weight of every row in the experts' scores: nodes -> [batch, nodes].
Score = Callable[[Nodes], Array]
# What a row contributes to every expert's score: (router's probabilities, experts that the row selected, their combine
# weights, 0 elsewhere), each [rows, experts] -> [rows, experts].
ExpertWeight = Callable[[Array, Array, Array], Array]
# Rows whose own experts precede all others in the shortlist: (nodes, anchor_probability) -> [batch, nodes]. The
# experts of the row with the largest value come first; 0 gives no precedence.
Anchor = Callable[[Nodes, float], Array]
# How many of the ranked experts are read: (scores in order of rank, mass) -> int32 scalar. It is clipped to the budget.
Size = Callable[[Array, float], Array]
# Where rows go that may use only experts `inside` the shortlist: (natural routing, router's probabilities, inside) ->
# routing of the same shape, whose weights are not renormalised.
Coverage = Callable[[Routing, Array, Array], Routing]


def acceptance_share(nodes: Nodes) -> Float[Array, "batch nodes"]:
    """Weigh a row by the acceptance rate of its depth over the square root of the number of nodes there (AcceptMoE,
    arXiv:2608.02989)."""
    same_depth = nodes.depth[:, :, None] == nodes.depth[:, None, :]
    return nodes.acceptance_by_depth[nodes.depth] / jnp.sqrt(jnp.sum(same_depth, axis=2, dtype=jnp.float32))


def root_first(nodes: Nodes, anchor_probability: float) -> Float[Array, "batch nodes"]:
    """Give precedence to the root's own experts."""
    return jnp.where(nodes.depth == 0, 2.0, 0.0)


def likely_first(nodes: Nodes, anchor_probability: float) -> Float[Array, "batch nodes"]:
    """Give precedence to the own experts of rows of at least `anchor_probability`, likelier rows first (OEA,
    arXiv:2511.02237)."""
    # The drafter may be certain of a node, too; the root, which is always in the tree, precedes it.
    precedence = nodes.path_probability + (nodes.depth == 0).astype(jnp.float32)
    return jnp.where(nodes.path_probability >= anchor_probability, precedence, 0.0)


def smallest_prefix(ranked: Float[Array, " experts"], mass: float) -> Int[Array, ""]:
    """Count the first experts that hold a share `mass` of all scores."""
    held = jnp.cumsum(ranked)
    return 1 + jnp.sum(held < mass * held[-1], dtype=jnp.int32)


def effective_rank(ranked: Float[Array, " experts"], mass: float) -> Int[Array, ""]:
    """Round up exp(entropy) of the normalised scores: the number of equal scores of the same entropy (AcceptMoE)."""
    total = jnp.sum(ranked)
    share = ranked / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return jnp.ceil(jnp.exp(entropy)).astype(jnp.int32)


def substitute(
    natural: Routing, probabilities: Float[Array, "rows experts"], inside: Bool[Array, " experts"]
) -> Routing:
    """Send every row to its k best experts inside the shortlist, with the router's probabilities as weights."""
    k, choice = natural.experts.shape[1], natural.choice
    ranking = probabilities if choice is None else choice.ranking
    weights, experts = jax.lax.top_k(jnp.where(inside[None, :], ranking, -jnp.inf), k)
    if choice is not None:
        weights = jnp.take_along_axis(choice.gates, experts, axis=1)
    return Routing(experts.astype(jnp.int32), weights)


def truncate(natural: Routing, probabilities: Float[Array, "rows experts"], inside: Bool[Array, " experts"]) -> Routing:
    """Leave every row those of its own experts that are inside the shortlist."""
    no_expert = probabilities.shape[1]
    own = jnp.minimum(natural.experts, no_expert - 1)
    gates = probabilities if natural.choice is None else natural.choice.gates
    weights = jnp.take_along_axis(gates, own, axis=1)
    every = jnp.arange(no_expert, dtype=own.dtype)
    kept = jnp.any((natural.experts[:, :, None] == every[None, None, :]) & inside[None, None, :], axis=2)
    return Routing(jnp.where(kept, own, no_expert).astype(jnp.int32), weights)


SCORES: dict[str, Score] = {
    "probability": lambda nodes: jnp.ones_like(nodes.path_probability),
    "path": lambda nodes: nodes.path_probability,
    "depth": acceptance_share,
}

EXPERT_WEIGHTS: dict[str, ExpertWeight] = {
    "all": lambda probabilities, selected, weights: probabilities,
    "hits": lambda probabilities, selected, weights: jnp.where(selected, probabilities, 0.0),
    "squares": lambda probabilities, selected, weights: weights * weights,
}

ANCHORS: dict[str, Anchor | None] = {"none": None, "root": root_first, "likely": likely_first}

SIZES: dict[str, Size] = {
    "fixed": lambda ranked, mass: jnp.int32(ranked.shape[0]),
    "mass": smallest_prefix,
    "rank": effective_rank,
}

COVERAGES: dict[str, Coverage] = {"substitute": substitute, "truncate": truncate}
