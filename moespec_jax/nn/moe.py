"""Mixture-of-Experts block over flattened tokens: route, run the chosen experts, combine."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig, RouterConfig
from moespec_jax.nn.layers import GatedMlp, gated_mlp
from moespec_jax.nn.routing import Restricted, Route, Routing, shard_routing
from moespec_jax.nn.routing import route as plain_route
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import psum
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan


@struct.dataclass
class SparseMlp:
    """Parameters of a sparse layer besides its routed experts, whose layout depends on the back-end; None where the
    family has none.

    Fields:
        router: weight of the router's logits.
        router_bias: their bias.
        correction: number added to the score of each expert for the choice.
        shared: shared expert.
        shared_gate: its gate.
    """

    router: Float[Array, "*stack experts model"]
    router_bias: Float[Array, "*stack experts"] | None = None
    correction: Float[Array, "*stack experts"] | Float[Array, "*stack 1 experts"] | None = None
    shared: GatedMlp | None = None
    shared_gate: Float[Array, "*stack 1 model"] | None = None

    __repr__ = summary


class RouterInfo(NamedTuple):
    """Routing of one layer, for inspection. A program that does not use a field does not compute it.

    Fields:
        inputs: rows that the router and the experts read.
        probabilities: the router's probabilities of all experts (`routing.route`).
        experts: expert ids before a budget.
        restricted: routing under a budget, None without one.
    """

    inputs: Float[Array, "tokens model"]
    probabilities: Float[Array, "tokens experts"]
    experts: Int[Array, "tokens active"]
    restricted: Restricted | None = None


# Routed experts of one sparse layer: (experts, layer, x [tokens, model], routing) -> [tokens, model].
ExpertCompute = Callable[[object, "int | Array", Array, Routing], Array]
# Limit on the experts of one sparse layer: (layer, router's probabilities, natural routing, valid) -> Restricted.
Restrict = Callable[["int | Array", Array, Routing, Array], Restricted]


def sparse_mlp(
    config: DecoderConfig,
    mlp: SparseMlp,
    experts: object,
    layer: int | Array,
    x: Float[Array, "tokens model"],
    valid: Bool[Array, " tokens"],
    compute: ExpertCompute,
    restrict: Restrict | None = None,
    sharding: ShardingPlan = REPLICATED,
    route: Route = plain_route,
) -> tuple[Float[Array, "tokens model"], RouterInfo]:
    """Run one sparse layer's feed-forward block; `layer` is its index among the sparse layers.

    On a mesh every device routes all tokens, runs the experts that it holds, and the outputs are summed.
    """
    if config.router == RouterConfig() and mlp.router_bias is None:
        natural, probabilities = route(config, mlp.router, x, valid)
    else:  # kernels have no other form
        natural, probabilities = plain_route(config, mlp.router, x, valid, mlp.router_bias, mlp.correction)
    restricted = None if restrict is None else restrict(layer, probabilities, natural, valid)
    routing = dataclasses.replace(natural, choice=None) if restricted is None else restricted.routing
    local = shard_routing(routing, config.num_experts, sharding.experts)
    y = routed_by(config.router, compute)(experts, layer, x, local).astype(x.dtype)
    if mlp.shared is None:
        y = psum(y, sharding.routed)
    else:
        shared = gated_mlp(x, mlp.shared, config.hidden_act)
        if mlp.shared_gate is not None:
            shared = jax.nn.sigmoid(jnp.einsum("td,od->to", x, mlp.shared_gate)) * shared
        # One all-reduce where routed and shared experts are split over the same axes.
        same_axes = sharding.routed == sharding.ffn
        y = psum(y + shared, sharding.ffn) if same_axes else psum(y, sharding.routed) + psum(shared, sharding.ffn)
    return y, RouterInfo(x, probabilities, natural.experts, restricted)


def routed_by(router: RouterConfig, compute: ExpertCompute) -> ExpertCompute:
    """Make the expert compute in which combine weights multiply what the router's form has them multiply."""
    return _scaled_inputs(compute) if router.scales_input else compute


def _scaled_inputs(compute: ExpertCompute) -> ExpertCompute:
    """Make the expert compute in which a combine weight multiplies the expert's input: every token is a row for each of
    its experts."""

    def run(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        (tokens, active), used = routing.experts.shape, routing.weights > 0
        rows = (x[:, None, :] * routing.weights.astype(x.dtype)[:, :, None]).reshape(tokens * active, -1)
        ids, ones = (values.reshape(-1, 1) for values in (routing.experts, used.astype(jnp.float32)))
        y = compute(experts, layer, rows, dataclasses.replace(routing, experts=ids, weights=ones))
        return jnp.sum(y.reshape(tokens, active, -1), axis=1)

    return run
