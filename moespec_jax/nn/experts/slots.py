"""Expert compute in plain lax over the `Flat` layout: each distinct expert's weights are indexed inside the product.

Up to `SLOT_TOKENS` tokens, a loop visits each distinct expert once and runs all tokens through it (tokens that did not
choose it get weight 0): on accelerators these rows are free, the weights are not. More tokens run in sorted blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.nn.experts.blocks import RunExpert, run_blocks
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import ACTIVATIONS
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Matrix, Quantized, product, row_of
from moespec_jax.nn.routing import Routing, combine_weights

SLOT_TOKENS = 64
BLOCKS = (64,)
# In how many parts a GPU adds up one token's product.
PARTS = 16


def slot_experts(activation: str) -> ExpertCompute:
    """Expert compute over the `Flat` layout, for any platform; `layer` may be traced."""

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, Flat)
        first = jnp.asarray(layer, jnp.int32) * experts.num_experts

        def run(rows: Array, expert: Array) -> Array:
            return _run(experts, first + expert, rows, activation)

        if x.shape[0] > SLOT_TOKENS:
            return run_blocks(x, routing, experts.num_experts, run, BLOCKS)
        return run_distinct(x, routing, experts.num_experts, run)

    return compute


def run_distinct(
    x: Float[Array, "tokens model"], routing: Routing, num_experts: int, run: RunExpert
) -> Float[Array, "tokens model"]:
    """All tokens through every expert that any of them goes to, once; float32. Tokens that do not go there take nothing
    from it."""
    ids, active = distinct_experts(routing, num_experts)
    combine = jnp.where(jnp.arange(len(ids))[None, :] < active, combine_weights(routing, ids), 0.0)

    def body(slot: Array, total: Array) -> Array:
        weight = jax.lax.dynamic_index_in_dim(combine, slot, axis=1)
        # Select, do not multiply by 0: an expert's inf must not turn into NaN for tokens that never chose it.
        return total + jnp.where(weight > 0, run(x, ids[slot]) * weight, 0.0)

    # One token fills its slots; a trip count known beforehand spares GPUs a wait for the host in every iteration.
    count = ids.shape[0] if x.shape[0] == 1 and not routing.sharded else active
    return jax.lax.fori_loop(0, count, body, jnp.zeros(x.shape, jnp.float32))


def distinct_experts(routing: Routing, num_experts: int) -> tuple[Int[Array, " slots"], Int[Array, ""]]:
    """Ids of the experts any token goes to, ascending, and their number; slots beyond hold any valid id.

    There are min(tokens * k, experts) slots, which is as many as can ever be wanted, or fewer where a budget says so.
    """
    if routing.experts.shape[0] == 1:
        # One token's experts are distinct already; nobody's id is the highest and sorts last.
        chosen = jnp.sort(routing.experts[0])
        return jnp.minimum(chosen, num_experts - 1), jnp.sum(chosen < num_experts, dtype=jnp.int32)
    every = jnp.arange(num_experts, dtype=jnp.int32)
    wanted = jnp.any(routing.experts.reshape(-1)[:, None] == every[None, :], axis=0)
    slots = min(routing.experts.size, num_experts, routing.max_distinct or num_experts)
    ids = jnp.argsort(~wanted, stable=True)[:slots].astype(jnp.int32)
    return ids, jnp.sum(wanted, dtype=jnp.int32)


def add_slots(
    out: Float[Array, "slots tokens model"], combine: Float[Array, "tokens slots"], active: Int[Array, ""]
) -> Float[Array, "tokens model"]:
    """What the first `active` slots give, weighted by `combine` and summed; the others may hold anything."""
    used = jnp.arange(out.shape[0]) < active
    weight = jnp.where(used[None, :], combine, 0.0).T[:, :, None]
    # Select, do not multiply by 0: an expert's inf must not turn into NaN for tokens that never chose it.
    return jnp.sum(jnp.where(weight > 0, out * weight, 0.0), axis=0)


def _run(experts: Flat, row: Array, x: Array, activation: str) -> Array:
    def times(rows: Array, weights: Matrix) -> Array:
        if rows.shape[0] > 1 or rows.shape[1] % PARTS or isinstance(weights, Quantized):
            return _whole(rows, weights, row)
        return jax.lax.platform_dependent(rows, weights, row, cuda=_in_parts, default=_whole)

    hidden = ACTIVATIONS[activation](times(x, experts.gate)) * times(x, experts.up)
    return times(hidden.astype(x.dtype), experts.down)


def _whole(rows: Array, weights: Matrix, row: Array) -> Array:
    return product(rows, row_of(weights, row))


def _in_parts(rows: Array, weights: Array, row: Array) -> Array:
    """The same. In one part, XLA:GPU writes matrix times token to memory before it adds up."""
    matrix = jax.lax.dynamic_index_in_dim(weights, row, axis=0, keepdims=False)
    tokens, parts = rows.reshape(rows.shape[0], PARTS, -1), matrix.reshape(PARTS, -1, matrix.shape[1])
    sums = jnp.einsum("tsd,sdf->stf", tokens, parts, preferred_element_type=jnp.float32)
    # Without a barrier between them, the compiler makes one sum of both again.
    return jnp.sum(jax.lax.optimization_barrier(sums), axis=0)
