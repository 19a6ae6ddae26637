"""Capacity-bounded dispatch for training: every shape static, every operation differentiable, one batched matmul.

Each expert takes at most `capacity_factor * tokens * k / experts` tokens; the rest of an overfull expert's tokens skip
it (Switch Transformer, arXiv:2101.03961, section 2.2). Training only: generation never drops a token.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.routing import Routing


@struct.dataclass
class ExpertStack:
    """The experts of one layer as three arrays with a leading expert axis."""

    gate: Float[Array, "experts model ffn"]
    up: Float[Array, "experts model ffn"]
    down: Float[Array, "experts ffn model"]


def capacity_experts(capacity_factor: float, activation: str = "silu") -> ExpertCompute:
    """Expert compute over a tuple of `ExpertStack`, one a sparse layer, each expert limited to its capacity."""

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, tuple) and isinstance(layer, int)
        stack: ExpertStack = experts[layer]
        tokens, k = routing.experts.shape
        capacity = max(1, int(capacity_factor * tokens * k / stack.gate.shape[0]))
        source, slot = _assign(routing.experts, stack.gate.shape[0], capacity)
        padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        rows = padded[source].reshape(stack.gate.shape[0], capacity, -1)
        hidden = ACTIVATIONS[activation](jnp.einsum("ecd,edf->ecf", rows, stack.gate))
        hidden = hidden * jnp.einsum("ecd,edf->ecf", rows, stack.up)
        out = jnp.einsum("ecf,efd->ecd", hidden, stack.down).reshape(-1, x.shape[-1])
        out = jnp.concatenate([out, jnp.zeros_like(out[:1])])[slot].reshape(tokens, k, -1)
        return jnp.sum(out * routing.weights[:, :, None].astype(out.dtype), axis=1)

    return compute


def _assign(experts: Array, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Which token fills each slot `[experts * capacity]` (`tokens` for none), and which slot each route of each token
    got `[tokens * k]` (`experts * capacity` for none). Earlier tokens win a full expert's slots."""
    tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    count = jnp.zeros((num_experts,), jnp.int32).at[flat].add(1, mode="drop")
    first = jnp.cumsum(count, dtype=jnp.int32) - count
    nth = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    taken = nth < count[:, None]
    routes = order[jnp.clip(first[:, None] + nth, 0, tokens * k - 1)]
    source = jnp.where(taken, routes // k, tokens).reshape(-1)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32))
    within = rank - first[jnp.clip(flat, 0, num_experts - 1)]
    fits = (within < capacity) & (flat < num_experts)
    return source, jnp.where(fits, flat * capacity + within, num_experts * capacity)
