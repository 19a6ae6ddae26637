"""Mixture-of-Experts block: route, run the chosen experts, combine. Over flattened tokens, one layer at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.layers import GatedMlp, gated_mlp
from moespec_jax.nn.routing import Restricted, Routing, route, routing_here
from moespec_jax.parallel.collectives import total
from moespec_jax.parallel.mesh import WHOLE, Split


@struct.dataclass
class SparseMlp:
    """What a sparse layer has besides its experts, which live apart because back-ends lay them out differently."""

    router: Float[Array, "experts model"]
    shared: GatedMlp | None = None
    shared_gate: Float[Array, "1 model"] | None = None


class RouterInfo(NamedTuple):
    """What a person wants to know about one routing decision: the rows that router and experts saw, softmax over all
    experts, the ids chosen, and what a budget made of them, if there was one. Programs that do not use one of these do
    not keep it."""

    inputs: Float[Array, "tokens model"]
    probabilities: Float[Array, "tokens experts"]
    experts: Int[Array, "tokens active"]
    restricted: Restricted | None = None


# Runs x [tokens, model] through the routed experts of one sparse layer (experts, layer, x, routing) -> [tokens, model]
ExpertCompute = Callable[[object, "int | Array", Array, Routing], Array]
# Limits the experts of one sparse layer (layer, probabilities, natural routing, valid) -> Restricted
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
    split: Split = WHOLE,
) -> tuple[Float[Array, "tokens model"], RouterInfo]:
    """One sparse layer's feed-forward block; `layer` counts sparse layers only, as `experts` does.

    Every device of a mesh routes all tokens alike, runs them through the experts that it holds, and adds up with the
    others.
    """
    natural, probabilities = route(config, mlp.router, x, valid)
    restricted = None if restrict is None else restrict(layer, probabilities, natural, valid)
    routing = natural if restricted is None else restricted.routing
    here = routing_here(routing, config.num_experts, split.experts)
    y = compute(experts, layer, x, here).astype(x.dtype)
    if mlp.shared is None or mlp.shared_gate is None:
        y = total(y, split.routed)
    else:
        gate = jax.nn.sigmoid(jnp.einsum("td,od->to", x, mlp.shared_gate))
        common = gate * gated_mlp(x, mlp.shared, config.hidden_act)
        # One exchange where both are split over the same devices.
        together = split.routed == split.ffn
        y = total(y + common, split.ffn) if together else total(y, split.routed) + total(common, split.ffn)
    return y, RouterInfo(x, probabilities, natural.experts, restricted)
