"""Which experts each token goes to, and with what weight: what the router says, and the currency of expert compute."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.parallel.mesh import EXPERT


@struct.dataclass
class Routing:
    """Which experts each token goes to and with what weight. An expert id of `num_experts` means none.

    `max_distinct` is how many different experts there can be among them, where that is known to be fewer than tokens
    and experts allow: expert compute then needs no more slots. `groups` is among how many equal groups of consecutive
    experts these are divided evenly. `elsewhere`: some tokens' experts may be held by other devices.
    """

    experts: Int[Array, "tokens active"]
    weights: Float[Array, "tokens active"]
    max_distinct: int | None = struct.field(pytree_node=False, default=None)
    groups: int = struct.field(pytree_node=False, default=1)
    elsewhere: bool = struct.field(pytree_node=False, default=False)


class Restricted(NamedTuple):
    """What a budget made of one layer's routing.

    `shortlist` holds expert ids, best first, and `num_experts` in slots not in use; `mass_kept` is its share of the
    scores summed over all experts. `replaced` marks tokens that lost an expert of their own, `live` those that are
    still in the tree.
    """

    routing: Routing
    shortlist: Int[Array, " slots"]
    mass_kept: Float[Array, ""]
    replaced: Bool[Array, " tokens"]
    live: Bool[Array, " tokens"]


def route(
    config: DecoderConfig,
    router: Float[Array, "experts model"],
    x: Float[Array, "tokens model"],
    valid: Bool[Array, " tokens"],
) -> tuple[Routing, Float[Array, "tokens experts"]]:
    """Softmax over all experts, the k most probable, renormalised if the model does (`norm_topk_prob`).

    Tokens that are not `valid` (padding, finished sequences) go to no expert, so that they cost no weight reads.
    """
    logits = jnp.einsum("td,nd->tn", x, router, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = normalise(weights)
    nobody = jnp.int32(config.num_experts)
    routing = Routing(
        jnp.where(valid[:, None], experts.astype(jnp.int32), nobody), jnp.where(valid[:, None], weights, 0.0)
    )
    return routing, probabilities


def routing_here(routing: Routing, num_experts: int, shards: int) -> Routing:
    """The same routing for a device of a mesh, which holds one of `shards` equal shards of a layer's experts: ids count
    from its first one, and tokens go to nobody instead of an expert elsewhere."""
    if shards == 1:
        return routing
    held = num_experts // shards
    local = routing.experts - jax.lax.axis_index(EXPERT) * held
    mine = (local >= 0) & (local < held)
    most = routing.max_distinct
    if most is not None:
        most = min(most // shards if routing.groups % shards == 0 else most, held)
    return Routing(jnp.where(mine, local, held), jnp.where(mine, routing.weights, 0.0), most, elsewhere=True)


def normalise(weights: Float[Array, "tokens active"]) -> Float[Array, "tokens active"]:
    """Each token's weights to a sum of 1; a token that has none keeps none."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def combine_weights(routing: Routing, ids: Int[Array, " slots"]) -> Float[Array, "tokens slots"]:
    """Weight of every slot's expert for every token, 0 where the token does not go there."""
    chosen = routing.experts[:, :, None] == ids[None, None, :]
    return jnp.sum(jnp.where(chosen, routing.weights[:, :, None], 0.0), axis=1)
