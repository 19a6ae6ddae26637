"""Rows sorted by expert and run in fixed-size blocks: the cost follows the routed tokens, not tokens x experts.

Routes (a token paired with one of its experts) are sorted by expert, so that each expert's rows are contiguous. Each
expert's rows are then run in blocks of a static size, a traced number of blocks in all. Example, blocks of 2 rows,
experts a, b, c with 3, 0 and 2 routes:

    rows     a a a c c          first block of a: rows 0-1, second: rows 2-3 (row 3 is c's: computed in vain and
    blocks   1 1 2 3 3          then overwritten by c's own block, which comes later)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.moe import Routing

# Runs `rows` `[block, model]` through one expert (traced id) and returns `[block, model]` float32.
RunExpert = Callable[[Array, Array], Array]


class SortedRoutes(NamedTuple):
    """Routes in order of their expert. Routes to nobody come last and belong to no expert's range."""

    token: Int[Array, " routes"]
    rank: Int[Array, " routes"]
    first: Int[Array, " experts"]
    count: Int[Array, " experts"]


def sort_routes(routing: Routing, num_experts: int) -> SortedRoutes:
    """Sort all tokens' routes by expert; `rank` says where each route of each token went."""
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32), side="left").astype(jnp.int32)
    rank = jnp.argsort(order).astype(jnp.int32)
    return SortedRoutes(order // routing.experts.shape[1], rank, bounds[:-1], bounds[1:] - bounds[:-1])


def run_blocks(
    x: Float[Array, "tokens model"],
    routing: Routing,
    num_experts: int,
    run: RunExpert,
    block: int,
    large_block: int = 0,
) -> Float[Array, "tokens model"]:
    """Every token through its experts, weighted and summed, float32.

    With a `large_block`, each expert's whole large blocks run as such and only its remaining rows in small ones. The
    small ones run first: what they spill into the next expert's rows is then overwritten by its owner.
    """
    routes = sort_routes(routing, num_experts)
    tokens, k = routing.experts.shape
    spill = max(block, large_block)
    rows = jnp.pad(x[routes.token], ((0, spill), (0, 0)))
    out = jnp.zeros((tokens * k + spill, x.shape[1]), jnp.float32)
    large = routes.count // large_block if large_block else jnp.zeros_like(routes.count)
    rest = routes.count - large * large_block
    out = _run_pass(rows, out, routes.first + large * large_block, (rest + block - 1) // block, block, run)
    if large_block:
        out = _run_pass(rows, out, routes.first, large, large_block, run)
    mixed = out[routes.rank].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", mixed, routing.weights)


def _run_pass(rows: Array, out: Array, begin: Array, blocks: Array, size: int, run: RunExpert) -> Array:
    """Blocks of `size` rows, `blocks[e]` of them for expert e from row `begin[e]` on, experts in ascending order."""
    end = jnp.cumsum(blocks, dtype=jnp.int32)

    def body(block: Array, out: Array) -> Array:
        expert = jnp.searchsorted(end, block, side="right").astype(jnp.int32)
        start = begin[expert] + (block - (end[expert] - blocks[expert])) * size
        result = run(jax.lax.dynamic_slice_in_dim(rows, start, size), expert)
        return jax.lax.dynamic_update_slice_in_dim(out, result, start, 0)

    return jax.lax.fori_loop(0, end[-1], body, out)
