"""Expert compute with gradients: every token through every expert of the layer, in plain matrix products.

Experts that a token did not choose have combine weight 0, so that outputs and gradients are those of the chosen ones.
All weights of the layer are read, and `experts / active` times as many products computed as the routing requires. It
has no loop whose length depends on the routing, and therefore can be differentiated in both modes and vectorized.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moespec_jax.config import Activation
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import gated
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Matrix, widened
from moespec_jax.nn.routing import Routing, combine_weights


def dense_experts(activation: Activation) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout for any platform; `layer` may be traced."""

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        count = experts.num_experts
        first = jnp.asarray(layer, jnp.int32) * count

        def of_layer(matrices: Matrix) -> Array:
            of_one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), matrices)
            return widened(of_one, x.dtype)

        def times(matrices: Matrix, bias: Array | None) -> Array:
            products = jnp.einsum("td,edf->etf", x, of_layer(matrices), preferred_element_type=jnp.float32)
            return products if bias is None else products + of_layer(bias).astype(jnp.float32)

        combine = combine_weights(routing, jnp.arange(count, dtype=jnp.int32))
        hidden = gated(activation, times(experts.gate, experts.gate_bias), times(experts.up, experts.up_bias))
        hidden = (hidden * combine.T[:, :, None]).astype(x.dtype)
        y = jnp.einsum("etf,efd->td", hidden, of_layer(experts.down), preferred_element_type=jnp.float32)
        return y if experts.down_bias is None else y + combine @ of_layer(experts.down_bias)[:, 0].astype(jnp.float32)

    return compute
