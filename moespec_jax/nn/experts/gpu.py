"""Expert compute by a GPU kernel: the conditions under which it runs, and the fallback elsewhere."""

from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.slots import SLOT_TOKENS, distinct_experts, slot_experts
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Quantized
from moespec_jax.nn.routing import Routing, combine_weights

# Dtypes whose products tensor cores compute exactly; float32 would be rounded to a mantissa of 10 bits (TF32).
DTYPES = (jnp.bfloat16, jnp.float16)

# (activation, x, gate, up, down, combine, rows, active) -> float32, as `triton_gpu.fused_experts`.
FusedExperts = Callable[..., Array]


def kernel_experts(activation: str, activations: Container[str], tile: int, fused: FusedExperts) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout from a CUDA kernel; `layer` may be traced.

    On other platforms, and for quantized weights, activations without a kernel and operands that do not fit (`fits`),
    it is that of the back-end `slots`.

    Args:
        activation: name of the activation.
        activations: names that the kernel supports.
        tile: side of the kernel's tiles.
        fused: the kernel.
    """
    fallback = slot_experts(activation)

    def kernels(experts: Flat, layer: Array, x: Array, routing: Routing) -> Array:
        ids, active = distinct_experts(routing, experts.num_experts)
        rows = layer * experts.num_experts + ids
        combine = combine_weights(routing, ids)
        return fused(activation, x, experts.gate, experts.up, experts.down, combine, rows, active)

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        gate = experts.gate
        if isinstance(gate, Quantized) or activation not in activations or not fits(x, gate, tile):
            return fallback(experts, layer, x, routing)
        arguments = (experts, jnp.asarray(layer, jnp.int32), x, routing)
        return jax.lax.platform_dependent(*arguments, cuda=kernels, default=fallback)

    return compute


def fits(x: Float[Array, "tokens model"], gate: Float[Array, "all model ffn"], tile: int) -> bool:
    """Test whether a kernel supports the operands: few tokens, matrices of whole tiles, 16-bit floats."""
    whole_tiles = all(size % tile == 0 for size in gate.shape[1:])
    return x.shape[0] <= SLOT_TOKENS and whole_tiles and x.dtype == gate.dtype in DTYPES
