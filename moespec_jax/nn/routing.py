"""Routing: the experts of every token and their combine weights."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.mesh import EXPERT


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
    """

    experts: Int[Array, "*stack tokens active"]
    weights: Float[Array, "*stack tokens active"]
    max_distinct: int | None = struct.field(pytree_node=False, default=None)
    groups: int = struct.field(pytree_node=False, default=1)
    sharded: bool = struct.field(pytree_node=False, default=False)

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
) -> tuple[Routing, Float[Array, "tokens experts"]]:
    """Choose the k most probable experts of every token, renormalised if the model does (`norm_topk_prob`); also the
    router's softmax. `bias` is that of the logits.

    Tokens that are not `valid` (padding, finished sequences) get no expert, so that they cost no weight reads.
    """
    logits = jnp.einsum("td,nd->tn", x, router, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias[None, :].astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = normalise(weights)
    experts = jnp.where(valid[:, None], experts.astype(jnp.int32), jnp.int32(config.num_experts))
    return Routing(experts, jnp.where(valid[:, None], weights, 0.0)), probabilities


# `route`, or a function of its signature.
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
