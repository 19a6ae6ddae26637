"""The reference: every token through every expert, weighted. Reads everything; for tests and as an oracle."""

import jax.numpy as jnp
from jaxtyping import Array

from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import widened
from moespec_jax.nn.routing import Routing, combine_weights


def dense_experts(activation: str) -> ExpertCompute:
    """Expert compute over the `Flat` layout by plain einsums over all experts of the layer."""

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        ids = jnp.arange(experts.num_experts, dtype=jnp.int32)
        rows = jnp.asarray(layer, jnp.int32) * experts.num_experts + ids
        gate, up, down = (widened(w, x.dtype)[rows] for w in (experts.gate, experts.up, experts.down))
        hidden = ACTIVATIONS[activation](jnp.einsum("td,edf->etf", x, gate)) * jnp.einsum("td,edf->etf", x, up)
        mixed = jnp.einsum("etf,efd,te->td", hidden, down, combine_weights(routing, ids).astype(x.dtype))
        return mixed.astype(jnp.float32)

    return compute
