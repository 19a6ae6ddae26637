"""Routing: the experts of every token and their combine weights."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig, RouterConfig
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.mesh import EXPERT


@struct.dataclass
class Choice:
    """Scores by which the experts of every token are chosen, where they are not the probabilities alone; a budget
    chooses with them among fewer experts.

    Fields:
        ranking: score by which experts are ranked.
        gates: weight of every expert before renormalisation.
        router: settings of the router.
    """

    ranking: Float[Array, "*stack tokens experts"]
    gates: Float[Array, "*stack tokens experts"]
    router: RouterConfig = struct.field(pytree_node=False)

    __repr__ = summary


@struct.dataclass
class Routing:
    """Experts of every token, with their combine weights. Expert id `num_experts` stands for none. Routings of several
    layers have a leading axis.

    Fields:
        experts: expert ids.
        weights: combine weights, 0 where there is no expert.
        max_distinct: largest number of distinct experts, where it is known to be below what the numbers of tokens and
            experts allow; expert compute needs no more slots.
        groups: number of equal groups of consecutive experts among which `max_distinct` is divided evenly.
        sharded: whether other devices may hold some of the tokens' experts.
        choice: what a budget chooses by, in place of the probabilities.
    """

    experts: Int[Array, "*stack tokens active"]
    weights: Float[Array, "*stack tokens active"]
    max_distinct: int | None = struct.field(pytree_node=False, default=None)
    groups: int = struct.field(pytree_node=False, default=1)
    sharded: bool = struct.field(pytree_node=False, default=False)
    choice: Choice | None = None

    __repr__ = summary


class Restricted(NamedTuple):
    """Routing of one layer under an expert budget.

    Fields:
        routing: experts inside the shortlist, of the rows that are kept.
        shortlist: expert ids, best first; `num_experts` in unused slots.
        mass_kept: the shortlist's share of the scores of all experts.
        replaced: rows that lost an expert of their own.
        kept: rows that are still in the tree.
    """

    routing: Routing
    shortlist: Int[Array, " slots"]
    mass_kept: Float[Array, ""]
    replaced: Bool[Array, " tokens"]
    kept: Bool[Array, " tokens"]


def route(
    config: DecoderConfig,
    router: Float[Array, "experts model"],
    x: Float[Array, "tokens model"],
    valid: Bool[Array, " tokens"],
    bias: Float[Array, " experts"] | None = None,
    correction: Float[Array, "*row experts"] | None = None,
) -> tuple[Routing, Float[Array, "tokens experts"]]:
    """Choose the k best experts of every token, renormalised if the model does (`norm_topk_prob`); also the router's
    probabilities: its softmax, or, of a sigmoid router, its sigmoids scaled to a sum of 1. `bias` is that of the
    logits, and `correction` that of scores for the choice.

    Tokens that are not `valid` (padding, finished sequences) get no expert, so that they cost no weight reads.
    """
    x = x.astype(router.dtype) if config.router.float32 else x
    logits = jnp.einsum("td,nd->tn", x, router, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias[None, :].astype(jnp.float32)
    if cap := config.router.softcap:
        logits = cap * jnp.tanh(logits / cap)
    gates = _gates(config.router, logits)
    choice = None
    if not config.router.ranks_by_probability:
        # Sigmoids of large logits are equal in float32; without a correction, the logits rank.
        scores = logits if correction is None and config.router.score != "softmax" else gates
        choice = Choice(rank_scores(config.router, scores, correction), gates, config.router)
    weights, experts = jax.lax.top_k(gates if choice is None else choice.ranking, config.num_experts_per_tok)
    if choice is not None:
        weights = jnp.take_along_axis(gates, experts, axis=1)
    weights = finish_weights(weights, config.norm_topk_prob, choice)
    experts = jnp.where(valid[:, None], experts.astype(jnp.int32), jnp.int32(config.num_experts))
    routing = Routing(experts, jnp.where(valid[:, None], weights, 0.0), choice=choice)
    if config.router.score == "sparsemixer":
        return routing, jax.nn.softmax(logits, axis=-1)
    return routing, gates if config.router.score == "softmax" else normalise(gates)


def _gates(router: RouterConfig, logits: Float[Array, "tokens experts"]) -> Float[Array, "tokens experts"]:
    """Compute the weight of every expert before renormalisation."""
    if router.score == "sparsemixer":
        return sparsemixer_gates(logits, router.jitter)
    return jax.nn.sigmoid(logits) if router.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def sparsemixer_gates(logits: Float[Array, "tokens experts"], jitter: float) -> Float[Array, "tokens experts"]:
    """Compute the combine weights of SparseMixer-v2 (arXiv:2409.12136) without its noise: of the best expert, its share
    exp(logit) in the sum over experts whose logit is close to its own; of the second, its share without the best. Those
    of all others, which only a budget chooses, are in proportion to the second's."""
    first = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[1], dtype=bool)

    def shares(among: Bool[Array, "tokens experts"]) -> Float[Array, "tokens experts"]:
        best = jnp.max(jnp.where(among, logits, -jnp.inf), axis=-1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        parts = jnp.exp(jnp.minimum(logits - best, 0.0))
        return parts / jnp.sum(jnp.where(among & ~far, parts, 0.0), axis=-1, keepdims=True)

    return jnp.where(first, shares(jnp.ones_like(first)), shares(~first))


def rank_scores(
    router: RouterConfig, scores: Float[Array, "tokens experts"], correction: Float[Array, "*row experts"] | None
) -> Float[Array, "tokens experts"]:
    """Compute the scores by which experts are ranked: those of groups from which a token does not choose are below all
    others."""
    scores = scores if correction is None else scores + correction.reshape(1, -1)
    if router.groups_per_tok == router.groups:
        return scores
    grouped = scores.reshape(len(scores), router.groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    chosen = jax.lax.top_k(best, router.groups_per_tok)[1]
    inside = jnp.any(chosen[:, :, None] == jnp.arange(router.groups)[None, None, :], axis=1)
    inside = jnp.repeat(inside, grouped.shape[-1], axis=1)
    span = jnp.max(scores, axis=1, keepdims=True) - jnp.min(scores, axis=1, keepdims=True)
    return jnp.where(inside, scores, scores - span - 1.0)


def finish_weights(
    weights: Float[Array, "tokens active"], norm_topk_prob: bool, choice: Choice | None
) -> Float[Array, "tokens active"]:
    """Renormalise the weights of each token's experts where the model does, and scale them."""
    if choice is None:
        return normalise(weights) if norm_topk_prob else weights
    router = choice.router
    if norm_topk_prob:
        total = jnp.sum(weights, axis=-1, keepdims=True) + router.norm_epsilon
        total = jnp.maximum(total, router.norm_min)
        weights = weights / jnp.where(total > 0, total, 1.0)
    return weights if router.scale == 1.0 else weights * router.scale


# `route` of a router of the default settings without a bias, or a function of that signature.
Route = Callable[[DecoderConfig, Array, Array, Array], tuple[Routing, Array]]


# Routing under a budget whose rule ranks experts by score alone: (the same in plain operations, credit, whether to
# renormalise, slots, weight of each row, number of experts, router's softmax, natural routing, valid) -> Restricted.
Shortlist = Callable[..., Restricted]


def shard_routing(routing: Routing, num_experts: int, shards: int) -> Routing:
    """Restrict a routing to the experts of this device's shard, one of `shards` equal shards of a layer: ids count from
    the shard's first expert, and a token has no expert where another device holds it."""
    if shards == 1:
        return routing
    size = num_experts // shards
    local = routing.experts - jax.lax.axis_index(EXPERT) * size
    held = (local >= 0) & (local < size)
    most = routing.max_distinct
    if most is not None:
        most = min(most // shards if routing.groups % shards == 0 else most, size)
    return Routing(jnp.where(held, local, size), jnp.where(held, routing.weights, 0.0), most, sharded=True)


def normalise(weights: Float[Array, "*tokens active"]) -> Float[Array, "*tokens active"]:
    """Scale each token's weights to a sum of 1; weights that are all 0 stay 0."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def combine_weights(routing: Routing, ids: Int[Array, " slots"]) -> Float[Array, "tokens slots"]:
    """Combine weight of every slot's expert for every token, 0 where the token does not use it."""
    chosen = routing.experts[:, :, None] == ids[None, None, :]
    return jnp.sum(jnp.where(chosen, routing.weights[:, :, None], 0.0), axis=1)
