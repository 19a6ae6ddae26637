"""Expert budgets: which experts a verifying pass may read in one layer, and what becomes of tokens that wanted others.

MoE-Spec (arXiv:2602.16052): rank a layer's experts by a score summed over the tree, keep the best B as the shortlist,
and have every token make do with it. Scores, credits, anchors, sizes and coverages are tables of pure functions: a new
rule is one function and one name. Nothing here knows a model or its parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.nn.routing import Restricted, Routing, combine_weights, normalise
from moespec_jax.parallel.collectives import largest, over_data, total


class Nodes(NamedTuple):
    """What the draft knows of a verifying pass's rows, tree by tree.

    `chance` is the draft's own probability of the path to a node, 1 for the root (node 0); `depth` counts from the
    root; `ancestors[b, i]` marks the nodes on the way to node i, itself included. `committed[d]` is the share of rounds
    so far that committed a node of depth d, 1 for the root.
    """

    chance: Float[Array, "batch nodes"]
    depth: Int[Array, "batch nodes"]
    ancestors: Bool[Array, "batch nodes nodes"]
    committed: Float[Array, " depths"]


def check_names(rule: BudgetConfig) -> None:
    """Every name of a rule is in its table.

    Raises:
        ValueError: one is not.
    """
    tables = {"score": SCORES, "credit": CREDITS, "anchor": ANCHORS, "size": SIZES, "coverage": COVERAGES}
    for field, table in tables.items():
        if getattr(rule, field) not in table:
            raise ValueError(f"expected a budget's {field} of {', '.join(table)}; got {getattr(rule, field)!r}")


def restrict(
    rule: BudgetConfig,
    nodes: Nodes,
    norm_topk_prob: bool,
    layer: int | Array,
    probabilities: Float[Array, "tokens experts"],
    natural: Routing,
    valid: Bool[Array, " tokens"],
) -> Restricted:
    """Apply a resolved rule in one sparse layer, to the router's softmax and to what tokens would choose by it."""
    assert isinstance(rule.experts, tuple)
    bound = jnp.asarray(rule.experts, jnp.int32)[layer]
    return restrict_to(rule, nodes, norm_topk_prob, bound, probabilities, natural, valid)


def restrict_to(
    rule: BudgetConfig,
    nodes: Nodes,
    norm_topk_prob: bool,
    bound: Int[Array, ""],
    probabilities: Float[Array, "tokens experts"],
    natural: Routing,
    valid: Bool[Array, " tokens"],
) -> Restricted:
    """As `restrict`, with at most `bound` experts; the largest of `rule.experts` is how many slots there are."""
    assert isinstance(rule.experts, tuple)
    nobody, k, slots = probabilities.shape[1], natural.experts.shape[1], rule.slots
    weights = combine_weights(natural, jnp.arange(nobody, dtype=jnp.int32))
    hit = weights > 0
    say = jnp.where(valid, SCORES[rule.score](nodes).reshape(-1), 0.0)
    scores = total(jnp.sum(say[:, None] * CREDITS[rule.credit](probabilities, hit, weights), axis=0), over_data())
    precedence = _precedence(rule, nodes, hit)
    order = rank(scores, precedence)
    count = jnp.clip(SIZES[rule.size](rule, scores[order]), k, bound)
    if rule.groups > 1:
        order = rank_in_groups(rule.groups, scores, precedence)
        count = -(-count // rule.groups) * rule.groups
    shortlist = jnp.where(jnp.arange(slots, dtype=jnp.int32) < count, order[:slots], nobody)
    inside = jnp.any(shortlist[:, None] == jnp.arange(nobody, dtype=jnp.int32)[None, :], axis=0)
    live = valid & _faithful(rule, nodes, weights, hit, inside)
    routing = COVERAGES[rule.coverage](probabilities, k, inside)
    routing = _within(routing, live, nobody, norm_topk_prob)
    return Restricted(
        dataclasses.replace(routing, max_distinct=slots, groups=rule.groups),
        shortlist,
        _share(jnp.sum(jnp.where(inside, scores, 0.0)), jnp.sum(scores)),
        jnp.any(hit & ~inside[None, :], axis=1),
        live,
    )


def rank(
    scores: Float[Array, " experts"], precedence: Float[Array, " experts"] | None = None
) -> Int[Array, " experts"]:
    """Expert ids, best first: by precedence if there is one, then by score, then the lower id."""
    if precedence is None:
        return jax.lax.top_k(scores, scores.shape[0])[1].astype(jnp.int32)
    return jnp.lexsort((-scores, -precedence)).astype(jnp.int32)


def rank_in_groups(
    groups: int, scores: Float[Array, " experts"], precedence: Float[Array, " experts"] | None
) -> Int[Array, " experts"]:
    """The best of every group of consecutive experts, group by group, then the second best of each, and so on."""
    parts = scores.reshape(groups, -1)
    first = [None] * groups if precedence is None else list(precedence.reshape(groups, -1))
    within = jnp.stack([rank(parts[g], first[g]) + g * parts.shape[1] for g in range(groups)])
    return within.T.reshape(-1)


def committed_share(nodes: Nodes) -> Float[Array, "batch nodes"]:
    """The chance that a node of this depth is committed, over the square root of how many there are (AcceptMoE,
    arXiv:2608.02989)."""
    same = nodes.depth[:, :, None] == nodes.depth[:, None, :]
    return nodes.committed[nodes.depth] / jnp.sqrt(jnp.sum(same, axis=2, dtype=jnp.float32))


def smallest_prefix(rule: BudgetConfig, ranked: Float[Array, " experts"]) -> Int[Array, ""]:
    """How many of the first hold a share `rule.mass` of all scores."""
    held = jnp.cumsum(ranked)
    return 1 + jnp.sum(held < rule.mass * held[-1], dtype=jnp.int32)


def effective_rank(rule: BudgetConfig, ranked: Float[Array, " experts"]) -> Int[Array, ""]:
    """How many equal scores would have the entropy that these have (AcceptMoE), rounded up."""
    share = _share(ranked, jnp.sum(ranked))
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return jnp.ceil(jnp.exp(entropy)).astype(jnp.int32)


def substitute(probabilities: Float[Array, "tokens experts"], k: int, inside: Bool[Array, " experts"]) -> Routing:
    """Every token takes its k best experts inside the shortlist, at their original probabilities."""
    weights, experts = jax.lax.top_k(jnp.where(inside[None, :], probabilities, -1.0), k)
    return Routing(experts.astype(jnp.int32), weights)


def truncate(probabilities: Float[Array, "tokens experts"], k: int, inside: Bool[Array, " experts"]) -> Routing:
    """Every token keeps its own experts, and does without those outside the shortlist."""
    weights, experts = jax.lax.top_k(probabilities, k)
    every = jnp.arange(inside.shape[0], dtype=experts.dtype)
    kept = jnp.any((experts[:, :, None] == every[None, None, :]) & inside[None, None, :], axis=2)
    return Routing(jnp.where(kept, experts, inside.shape[0]).astype(jnp.int32), weights)


# How much each row's say counts in the scores, [batch, nodes].
SCORES: dict[str, Callable[[Nodes], Array]] = {
    "probability": lambda nodes: jnp.ones_like(nodes.chance),
    "path": lambda nodes: nodes.chance,
    "depth": committed_share,
}

# What a row says of each expert, from its softmax, whether it chose the expert, and with what weight.
CREDITS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "all": lambda probabilities, hit, weights: probabilities,
    "hits": lambda probabilities, hit, weights: jnp.where(hit, probabilities, 0.0),
    "squares": lambda probabilities, hit, weights: weights * weights,
}

# Which rows' own experts come before all others, and before each other: the largest first, 0 for the rest,
# [batch, nodes].
ANCHORS: dict[str, Callable[[Nodes], Array]] = {
    "none": lambda nodes: jnp.zeros_like(nodes.chance),
    "root": lambda nodes: jnp.where(nodes.depth == 0, 2.0, 0.0),
}

# How many of the ranked experts are used, within 1 token's k and the budget: (rule, scores in order of rank) -> number.
SIZES: dict[str, Callable[[BudgetConfig, Array], Array]] = {
    "fixed": lambda rule, ranked: jnp.int32(ranked.shape[0]),
    "mass": smallest_prefix,
    "rank": effective_rank,
}

# Where tokens go that may go to the shortlist only: (probabilities, k, inside or not) -> Routing, not renormalised.
COVERAGES: dict[str, Callable[[Array, int, Array], Routing]] = {
    "substitute": substitute,
    "truncate": truncate,
    # Likely rows keep their own experts, which precede all others in the shortlist (OEA, arXiv:2511.02237).
    "guarantee": substitute,
}


def _precedence(rule: BudgetConfig, nodes: Nodes, hit: Bool[Array, "tokens experts"]) -> Array | None:
    """What comes before the scores: the precedence of the first row, anchored or guaranteed, that chose the expert."""
    if rule.anchor == "none" and rule.coverage != "guarantee":
        return None
    rows = ANCHORS[rule.anchor](nodes)
    if rule.coverage == "guarantee":
        # A draft that is certain of itself has a chance of 1; the root, which is there in any case, comes before it.
        own = nodes.chance + (nodes.depth == 0).astype(jnp.float32)
        rows = jnp.maximum(rows, jnp.where(nodes.chance >= rule.guarantee, own, 0.0))
    return largest(jnp.max(jnp.where(hit, rows.reshape(-1)[:, None], 0.0), axis=0), over_data())


def _faithful(rule: BudgetConfig, nodes: Nodes, weights: Array, hit: Array, inside: Array) -> Bool[Array, " tokens"]:
    """Rows that keep enough of the weight of their own experts, as do all their ancestors; roots stay in any case."""
    if rule.faithfulness <= 0:
        return jnp.ones(hit.shape[:1], bool)
    if rule.faithfulness >= 1:
        enough = ~jnp.any(hit & ~inside[None, :], axis=1)
    else:
        kept = jnp.sum(jnp.where(inside[None, :], weights, 0.0), axis=1)
        enough = kept >= rule.faithfulness * jnp.sum(weights, axis=1)
    enough = enough.reshape(nodes.depth.shape) | (nodes.depth == 0)
    return jnp.all(enough[:, None, :] | ~nodes.ancestors, axis=2).reshape(-1)


def _within(routing: Routing, live: Bool[Array, " tokens"], nobody: int, norm_topk_prob: bool) -> Routing:
    """Rows that are not live go to nobody, and nobody has no weight."""
    experts = jnp.where(live[:, None], routing.experts, nobody)
    weights = jnp.where(experts < nobody, routing.weights, 0.0)
    return Routing(experts, normalise(weights) if norm_topk_prob else weights)


def _share(part: Array, total: Array) -> Array:
    return part / jnp.where(total > 0, total, 1.0)
