"""Capacity-bounded expert compute for training: static shapes, differentiable, one batched product for each matrix.

Each expert processes at most `capacity_factor * tokens * k / experts` tokens; further ones skip it (Switch
Transformer, arXiv:2101.03961, section 2.2). For training only: generation drops no token. `every_expert` computes the
same without a capacity.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.routing import Routing, combine_weights
from moespec_jax.nn.summary import summary


@struct.dataclass
class ExpertStack:
    """Experts of one layer as three arrays with a leading expert axis; matrices are `[in, out]`."""

    gate: Float[Array, "experts model ffn"]
    up: Float[Array, "experts model ffn"]
    down: Float[Array, "experts ffn model"]

    __repr__ = summary


def capacity_experts(capacity_factor: float, activation: str = "silu") -> ExpertCompute:
    """Build the expert compute over a tuple of `ExpertStack`, one for each sparse layer; `layer` is static."""

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


def every_expert(activation: str = "silu") -> ExpertCompute:
    """Build the same without a capacity: every expert processes every token, in three products for all experts."""

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, tuple) and isinstance(layer, int)
        stack: ExpertStack = experts[layer]
        count, _, ffn = stack.gate.shape
        gate, up = (jnp.moveaxis(w, 0, 1).reshape(x.shape[-1], count * ffn) for w in (stack.gate, stack.up))
        combine = combine_weights(routing, jnp.arange(count, dtype=jnp.int32)).astype(x.dtype)
        hidden = (ACTIVATIONS[activation](x @ gate) * (x @ up)).reshape(-1, count, ffn) * combine[:, :, None]
        return hidden.reshape(-1, count * ffn) @ stack.down.reshape(count * ffn, -1)

    return compute


def _assign(experts: Array, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Assign routes to slots, of which each expert has `capacity`; earlier tokens precede later ones.

    Returns:
        The token of every slot, `[experts * capacity]`, `tokens` for none, and the slot of every route,
        `[tokens * k]`, `experts * capacity` for none.
    """
    tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    count = jnp.zeros((num_experts,), jnp.int32).at[flat].add(1, mode="drop")
    first = jnp.cumsum(count, dtype=jnp.int32) - count
    nth = jnp.arange(capacity, dtype=jnp.int32)[None, :]
    filled = nth < count[:, None]
    routes = order[jnp.clip(first[:, None] + nth, 0, tokens * k - 1)]
    source = jnp.where(filled, routes // k, tokens).reshape(-1)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=jnp.int32))
    within = rank - first[jnp.clip(flat, 0, num_experts - 1)]
    fits = (within < capacity) & (flat < num_experts)
    return source, jnp.where(fits, flat * capacity + within, num_experts * capacity)
