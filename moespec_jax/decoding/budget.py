"""Expert budgets: which experts a verification may read in one layer, and the routing that is left to its rows.

MoE-Spec (arXiv:2602.16052): score a layer's experts by a sum over the rows of the tree, keep the best B as the
shortlist, and route every row within it. Rules are given as functions (`budget_rules.py`); this module applies them and
knows neither a model nor its parameters.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.budget_rules import Nodes
from moespec_jax.nn.routing import Choice, Restricted, Routing, Shortlist, combine_weights, finish_weights
from moespec_jax.parallel.collectives import data_axes, pmax, psum
from moespec_jax.parallel.mesh import Axes

# `restrict`, or a function of its signature.
RestrictTree = Callable[..., Restricted]


def restrict(
    budget: BudgetConfig,
    nodes: Nodes,
    norm_topk_prob: bool,
    layer: int | Array,
    probabilities: Float[Array, "rows experts"],
    natural: Routing,
    valid: Bool[Array, " rows"],
    shortlist: Shortlist | None = None,
) -> Restricted:
    """Apply a resolved budget in one sparse layer.

    Args:
        budget: resolved for the model.
        nodes: the rows, tree by tree.
        norm_topk_prob: whether the model renormalises combine weights.
        layer: index among the sparse layers.
        probabilities: the router's probabilities of all experts.
        natural: routing without a budget.
        valid: rows that are still in the tree.
        shortlist: the back-end's form for rules that rank by score alone (`Backend.shortlist`).
    """
    assert isinstance(budget.experts, tuple)
    most = jnp.asarray(budget.experts, jnp.int32)[layer]
    rest = (probabilities, natural, valid, shortlist, data_axes())
    return restrict_to(budget, nodes, norm_topk_prob, most, *rest)


def restrict_to(
    budget: BudgetConfig,
    nodes: Nodes,
    norm_topk_prob: bool,
    most: Int[Array, ""],
    probabilities: Float[Array, "rows experts"],
    natural: Routing,
    valid: Bool[Array, " rows"],
    shortlist: Shortlist | None = None,
    axes: Axes = (),
) -> Restricted:
    """Restrict as `restrict` does, with at most `most` experts in `budget.slots` slots, which the rows of all devices
    along `axes` share."""
    row_weight = jnp.where(valid, budget.rule("score")(nodes).reshape(-1), 0.0)
    rest = (row_weight, most, probabilities, natural, valid)
    plain = partial(_restrict_rows, budget, nodes, norm_topk_prob, axes)
    if shortlist is None or natural.choice is not None or not budget.by_score_alone or axes:
        return plain(*rest)
    return shortlist(plain, budget.rule("credit"), norm_topk_prob, budget.slots, *rest)


def _restrict_rows(
    budget: BudgetConfig,
    nodes: Nodes,
    norm_topk_prob: bool,
    axes: Axes,
    row_weight: Float[Array, " rows"],
    most: Int[Array, ""],
    probabilities: Float[Array, "rows experts"],
    natural: Routing,
    valid: Bool[Array, " rows"],
) -> Restricted:
    num_experts, k, slots = probabilities.shape[1], natural.experts.shape[1], budget.slots
    every = jnp.arange(num_experts, dtype=jnp.int32)
    weights = combine_weights(natural, every)
    selected = weights > 0
    credit = budget.rule("credit")(probabilities, selected, weights)
    scores = psum(jnp.sum(row_weight[:, None] * credit, axis=0), axes)
    precedence = _precedence(budget, nodes, selected, axes)
    order = rank(scores, precedence)
    count = jnp.clip(budget.rule("size")(scores[order], budget.mass), k, most)
    if budget.groups > 1:
        order = rank_in_groups(budget.groups, scores, precedence)
        count = -(-count // budget.groups) * budget.groups
    shortlist = jnp.where(jnp.arange(slots, dtype=jnp.int32) < count, order[:slots], num_experts)
    inside = jnp.any(shortlist[:, None] == every[None, :], axis=0)
    kept = valid & _keeps_weight(budget, nodes, weights, selected, inside)
    covered = budget.rule("coverage")(natural, probabilities, inside)
    routing = _mask_pruned(covered, kept, num_experts, norm_topk_prob, natural.choice)
    total = jnp.sum(scores)
    return Restricted(
        routing=dataclasses.replace(routing, max_distinct=slots, groups=budget.groups),
        shortlist=shortlist,
        mass_kept=jnp.sum(jnp.where(inside, scores, 0.0)) / jnp.where(total > 0, total, 1.0),
        replaced=jnp.any(selected & ~inside[None, :], axis=1),
        kept=kept,
    )


def rank(
    scores: Float[Array, " experts"], precedence: Float[Array, " experts"] | None = None
) -> Int[Array, " experts"]:
    """Order expert ids, best first: by precedence if there is one, then by score, then by the lower id."""
    if precedence is None:
        return jax.lax.top_k(scores, scores.shape[0])[1].astype(jnp.int32)
    return jnp.lexsort((-scores, -precedence)).astype(jnp.int32)


def rank_in_groups(
    groups: int, scores: Float[Array, " experts"], precedence: Float[Array, " experts"] | None
) -> Int[Array, " experts"]:
    """Order expert ids: the best of every group of consecutive experts, then the second best of each, and so on."""
    parts = scores.reshape(groups, -1)
    first = [None] * groups if precedence is None else list(precedence.reshape(groups, -1))
    within = jnp.stack([rank(parts[g], first[g]) + g * parts.shape[1] for g in range(groups)])
    return within.T.reshape(-1)


def _precedence(
    budget: BudgetConfig, nodes: Nodes, selected: Bool[Array, "rows experts"], axes: Axes
) -> Float[Array, " experts"] | None:
    """Precedence of each expert over the scores: the largest of the anchored rows that selected it."""
    anchor = budget.rule("anchor")
    if anchor is None:
        return None
    rows = anchor(nodes, budget.anchor_probability).reshape(-1)
    return pmax(jnp.max(jnp.where(selected, rows[:, None], 0.0), axis=0), axes)


def _keeps_weight(
    budget: BudgetConfig,
    nodes: Nodes,
    weights: Float[Array, "rows experts"],
    selected: Bool[Array, "rows experts"],
    inside: Bool[Array, " experts"],
) -> Bool[Array, " rows"]:
    """Mark rows that keep `min_kept_weight` of the weight of their own experts, as do all their ancestors; roots always
    stay."""
    if not budget.prunes:
        return jnp.ones(selected.shape[:1], bool)
    if budget.min_kept_weight >= 1:
        enough = ~jnp.any(selected & ~inside[None, :], axis=1)
    else:
        kept = jnp.sum(jnp.where(inside[None, :], weights, 0.0), axis=1)
        enough = kept >= budget.min_kept_weight * jnp.sum(weights, axis=1)
    enough = enough.reshape(nodes.depth.shape) | (nodes.depth == 0)
    return jnp.all(enough[:, None, :] | ~nodes.ancestors, axis=2).reshape(-1)


def _mask_pruned(
    routing: Routing, kept: Bool[Array, " rows"], no_expert: int, norm_topk_prob: bool, choice: Choice | None
) -> Routing:
    """Mask pruned rows (expert `no_expert`, weight 0), and renormalise and scale what is left as the model does."""
    experts = jnp.where(kept[:, None], routing.experts, no_expert)
    weights = jnp.where(experts < no_expert, routing.weights, 0.0)
    return Routing(experts, finish_weights(weights, norm_topk_prob, choice))
