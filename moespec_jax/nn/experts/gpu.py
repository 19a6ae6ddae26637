"""What the GPU kernels share: when they run, and what runs in their place."""

from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.slots import SLOT_TOKENS, distinct_experts, slot_experts
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Quantized
from moespec_jax.nn.routing import Routing, combine_weights

# Inputs that the matrix units multiply exactly; float32 would be rounded to 10 bits (tf32).
DTYPES = (jnp.bfloat16, jnp.float16)

# All tokens through a slot list: (activation, x, gate, up, down, combine, rows, active) -> float32
FusedExperts = Callable[..., Array]


def kernel_experts(activation: str, activations: Container[str], tile: int, fused: FusedExperts) -> ExpertCompute:
    """Expert compute over the `Flat` layout by kernels for CUDA; `layer` may be traced.

    Everything else runs as under `slots`: other platforms, and what `fits` refuses.
    """
    otherwise = slot_experts(activation)

    def kernels(experts: Flat, layer: Array, x: Array, routing: Routing) -> Array:
        ids, active = distinct_experts(routing, experts.num_experts)
        rows = layer * experts.num_experts + ids
        combine = combine_weights(routing, ids)
        return fused(activation, x, experts.gate, experts.up, experts.down, combine, rows, active)

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        gate = experts.gate
        if isinstance(gate, Quantized) or activation not in activations or not fits(x, gate, tile):
            return otherwise(experts, layer, x, routing)
        arguments = (experts, jnp.asarray(layer, jnp.int32), x, routing)
        return jax.lax.platform_dependent(*arguments, cuda=kernels, default=otherwise)

    return compute


def fits(x: Float[Array, "tokens model"], gate: Float[Array, "all model ffn"], tile: int) -> bool:
    """Whether kernels of whole tiles take it: few tokens and 16-bit numbers."""
    whole = all(size % tile == 0 for size in gate.shape[1:])
    return x.shape[0] <= SLOT_TOKENS and whole and x.dtype == gate.dtype in DTYPES
