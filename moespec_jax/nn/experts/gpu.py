"""Expert compute by a GPU kernel: the conditions under which it runs, and the fallback elsewhere.

Up to `SLOT_TOKENS` tokens, a slot is one distinct expert, and all tokens run through it: the time is that of reading
the weights, and additional rows cost none. More tokens are sorted by expert, and a slot is a block of `BLOCK` rows of
one expert (a grouped product): the number of slots is static, so that the device does not wait for the host.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moespec_jax.config import Activation
from moespec_jax.nn.experts.blocks import lay_out_routes, owners, rows_of_routes
from moespec_jax.nn.experts.distinct_gpu import list_distinct, sum_places
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.slots import SLOT_TOKENS, slot_experts
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.routing import Routing

# Dtypes whose products tensor cores compute exactly; float32 would be rounded to a mantissa of 10 bits (TF32).
DTYPES = (jnp.bfloat16, jnp.float16)

# Rows of a slot of more than `SLOT_TOKENS` tokens.
BLOCK = 64

# (activation, x, experts, first, ids) -> float32, as `triton_gpu.slot_outputs`.
SlotOutputs = Callable[..., Array]
# (rows of every slot, or rows that all slots share; expert id of every slot, `num_experts` for none) -> rows of every
# slot after its expert, float32; undefined without one.
RunSlots = Callable[[Array, Array], Array]
# (activation, experts, dtype of tokens) -> what a kernel does not support of them; None if it runs.
Missing = Callable[[Activation, Flat, DTypeLike], str | None]


def kernel_experts(activation: Activation, missing: Missing, outputs: SlotOutputs) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout from a CUDA kernel; `layer` may be traced.

    On other platforms, and for what the kernel does not support, it is that of the back-end `slots`.

    Args:
        activation: activation of the experts.
        missing: names what the kernel does not support.
        outputs: the kernel.
    """
    fallback = slot_experts(activation)

    def kernels(experts: Flat, layer: Array, x: Array, routing: Routing) -> Array:
        first = layer * experts.num_experts

        def run(rows: Array, ids: Array) -> Array:
            return outputs(activation, rows, experts, first, ids)

        sum_experts = sum_distinct if x.shape[0] <= SLOT_TOKENS else sum_grouped
        return sum_experts(x, routing, experts.num_experts, run)

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        if missing(activation, experts, x.dtype) is not None:
            return fallback(experts, layer, x, routing)
        arguments = (experts, jnp.asarray(layer, jnp.int32), x, routing)
        return jax.lax.platform_dependent(*arguments, cuda=kernels, default=fallback)

    return compute


def unsupported(weights: jnp.dtype, sizes: tuple[int, ...], dtype: DTypeLike, tile: int) -> str | None:
    """Name what no kernel supports: weights that are neither 16-bit floats nor stored in fewer bits, tokens of another
    `dtype`, matrices of other `sizes` than whole tiles. None if it runs."""
    if weights not in (*DTYPES, jnp.int8, jnp.uint8):
        return f"experts in {weights}"
    if jnp.dtype(dtype) not in DTYPES or weights not in (jnp.dtype(dtype), jnp.int8, jnp.uint8):
        return f"tokens in {jnp.dtype(dtype)}"
    if any(size % tile for size in sizes):
        return "experts of " + " x ".join(map(str, sizes))
    return None


def sum_distinct(
    x: Float[Array, "tokens model"], routing: Routing, num_experts: int, run: RunSlots, *, interpret: bool = False
) -> Float[Array, "tokens model"]:
    """Run all tokens through every distinct expert, and sum the outputs by combine weight: float32, but rounded to the
    dtype of `x` where there are several tokens."""
    if x.shape[0] == 1:  # its experts are distinct
        weight = routing.weights[0, :, None]
        # Select instead of multiplying by 0: inf of an expert would become NaN for tokens that do not use it.
        return jnp.sum(jnp.where(weight > 0, run(x, routing.experts[0])[:, 0] * weight, 0.0), axis=0)[None]
    ids, places = list_distinct(routing, num_experts, interpret=interpret)
    # Rounded by the kernel, not by a launch of its own: the caller's dtype is that of `x`.
    return sum_places(run(x, ids), places, routing.weights, x.dtype, interpret=interpret).astype(jnp.float32)


def sum_grouped(
    x: Float[Array, "tokens model"], routing: Routing, num_experts: int, run: RunSlots
) -> Float[Array, "tokens model"]:
    """Run every token through its own experts, in blocks of rows of one expert, and sum the outputs by combine weight,
    float32."""
    # Computed once: XLA would compute a row's place again for each of its numbers.
    routes = jax.lax.optimization_barrier(lay_out_routes(routing, num_experts, BLOCK))
    blocks = rows_of_routes(x, routes).reshape(-1, BLOCK, x.shape[1])
    end = routes.begin + routes.length
    starts = jnp.arange(len(blocks), dtype=jnp.int32) * BLOCK
    # Blocks past the last have no expert.
    out = run(blocks, owners(end, starts))
    # A route without an expert has the row after the last; rows of unused blocks are undefined, and no route has one.
    mixed = out.reshape(-1, out.shape[-1]).at[routes.row].get(mode="fill", fill_value=0.0)
    return jnp.einsum("tkd,tk->td", mixed.reshape(*routing.weights.shape, -1), routing.weights)
