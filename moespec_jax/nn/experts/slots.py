"""Expert compute in plain lax over the `Flat` layout: each distinct expert's weights are indexed inside the product.

A slot is the place of one distinct expert. Up to `SLOT_TOKENS` tokens, a loop over slots runs all tokens through each
expert; tokens that do not use it have combine weight 0. On accelerators the time is that of reading the weights, and
additional rows cost none. More tokens run in blocks of rows sorted by expert (`blocks.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import Activation
from moespec_jax.nn.experts.blocks import RunExpert, run_blocks
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import add_bias, gated
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.quantization import Matrix, product, row_of
from moespec_jax.nn.routing import Routing, combine_weights

SLOT_TOKENS = 64
BLOCKS = (64,)
# Number of parts into which one token's products are split along the summed axis on GPU (split-K).
PARTS = 16


def slot_experts(activation: Activation) -> ExpertCompute:
    """Build the expert compute over the `Flat` layout for any platform; `layer` may be traced."""

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
    """Run all tokens through every distinct expert, once each, and sum the outputs by combine weight, float32."""
    ids, active = distinct_experts(routing, num_experts)
    combine = jnp.where(jnp.arange(len(ids))[None, :] < active, combine_weights(routing, ids), 0.0)

    def body(slot: Array, total: Array) -> Array:
        weight = jax.lax.dynamic_index_in_dim(combine, slot, axis=1)
        # Select instead of multiplying by 0: inf of an expert would become NaN for tokens that do not use it.
        return total + jnp.where(weight > 0, run(x, ids[slot]) * weight, 0.0)

    # One token fills all slots; with a static trip count, a GPU does not wait for the host in every iteration.
    count = ids.shape[0] if x.shape[0] == 1 and not routing.sharded else active
    return jax.lax.fori_loop(0, count, body, jnp.zeros(x.shape, jnp.float32))


def distinct_experts(routing: Routing, num_experts: int) -> tuple[Int[Array, " slots"], Int[Array, ""]]:
    """List the ids of the experts that any token uses, ascending, and count them; further slots have some valid id.

    There are min(tokens * k, experts) slots, the largest number of distinct experts, or fewer under a budget
    (`Routing.max_distinct`).
    """
    if routing.experts.shape[0] == 1:
        # One token's experts are distinct; the id for no expert is the highest and sorts last.
        chosen = jnp.sort(routing.experts[0])
        return jnp.minimum(chosen, num_experts - 1), jnp.sum(chosen < num_experts, dtype=jnp.int32)
    all_ids = jnp.arange(num_experts, dtype=jnp.int32)
    selected = jnp.any(routing.experts.reshape(-1)[:, None] == all_ids[None, :], axis=0)
    slots = min(routing.experts.size, num_experts, routing.max_distinct or num_experts)
    ids = jnp.argsort(~selected, stable=True)[:slots].astype(jnp.int32)
    return ids, jnp.sum(selected, dtype=jnp.int32)


def _run(experts: Flat, row: Array, x: Array, activation: Activation) -> Array:
    def times(rows: Array, weights: Matrix, bias: Array | None) -> Array:
        if rows.shape[0] > 1 or rows.shape[1] % PARTS or not isinstance(weights, Array):
            products = _whole(rows, weights, row)
        else:
            products = jax.lax.platform_dependent(rows, weights, row, cuda=_split_k, default=_whole)
        return (
            products
            if bias is None
            else add_bias(products, jax.lax.dynamic_index_in_dim(bias, row, axis=0, keepdims=False))
        )

    hidden = gated(activation, times(x, experts.gate, experts.gate_bias), times(x, experts.up, experts.up_bias))
    return times(hidden.astype(x.dtype), experts.down, experts.down_bias)


def _whole(rows: Array, weights: Matrix, row: Array) -> Array:
    return product(rows, row_of(weights, row))


def _split_k(rows: Array, weights: Array, row: Array) -> Array:
    """Compute `_whole` in `PARTS` parts of the summed axis: for the whole axis, XLA:GPU writes the elementwise product
    of matrix and token to memory before it sums."""
    matrix = jax.lax.dynamic_index_in_dim(weights, row, axis=0, keepdims=False)
    tokens, parts = rows.reshape(rows.shape[0], PARTS, -1), matrix.reshape(PARTS, -1, matrix.shape[1])
    sums = jnp.einsum("tsd,sdf->stf", tokens, parts, preferred_element_type=jnp.float32)
    # Without a barrier, the compiler merges both sums into one.
    return jnp.sum(jax.lax.optimization_barrier(sums), axis=0)
