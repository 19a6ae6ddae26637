"""Expert compute in blocks of rows sorted by expert: its cost grows with the number of routes, not tokens x experts.

Routes (a token paired with one of its experts) are laid out expert by expert, each expert's rows padded up to a
multiple of the smallest block size, and then covered by blocks of a few static sizes, a traced number of each.
Example: sizes 4 and 2; experts a, b, c with 5, 0 and 1 routes; dots are padding:

    rows      a a a a a . c .
    size 4    1 1 1 1
    size 2            1 1 2 2
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.nn.routing import Routing

# Output of one expert: (rows [block, model], traced expert id) -> [block, model] float32.
RunExpert = Callable[[Array, Array], Array]


class PaddedRoutes(NamedTuple):
    """Routes laid out by expert.

    Fields:
        token: token of each row; the number of tokens in rows of padding.
        row: row of each route, in order of tokens; the number of rows where the route has no expert.
        begin: first row of each expert.
        length: number of rows of each expert, padding included.
    """

    token: Int[Array, " rows"]
    row: Int[Array, " routes"]
    begin: Int[Array, " experts"]
    length: Int[Array, " experts"]


def lay_out_routes(routing: Routing, num_experts: int, unit: int) -> PaddedRoutes:
    """Assign a row to every route, each expert's rows padded to a multiple of `unit`.

    Computed with gathers only: such a scatter is slow on accelerators, and some TPU compilers reject it beside a sort.
    """
    tokens, k = routing.experts.shape
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = _count_before(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32), "left")
    first, count = bounds[:-1], bounds[1:] - bounds[:-1]
    length = (count + unit - 1) // unit * unit
    end = jnp.cumsum(length, dtype=jnp.int32)
    begin = end - length
    rows = jnp.arange(_row_bound(tokens * k, num_experts, unit), dtype=jnp.int32)
    owner = jnp.clip(owners(end, rows), 0, num_experts - 1)
    within = rows - begin[owner]
    route = order[jnp.clip(first[owner] + within, 0, tokens * k - 1)]
    expert = jnp.clip(flat, 0, num_experts - 1)
    rank = jnp.argsort(order).astype(jnp.int32)
    token = jnp.where(within < count[owner], route // k, tokens)
    row = jnp.where(flat < num_experts, begin[expert] + rank - first[expert], rows.size)
    return PaddedRoutes(token, row, begin, length)


def owners(end: Int[Array, " experts"], rows: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """Find the expert of each row; the number of experts past the last row. `end` are the ends of the experts' rows."""
    return _count_before(end, rows, "right")


def _count_before(
    ascending: Int[Array, " many"], values: Int[Array, " some"], side: Literal["left", "right"]
) -> Int[Array, " some"]:
    # A binary search is a loop, and every step of it some launches; the numbers here are small.
    return jnp.searchsorted(ascending, values, side=side, method="compare_all").astype(jnp.int32)


def rows_of_routes(x: Float[Array, "tokens model"], routes: PaddedRoutes) -> Float[Array, "rows model"]:
    """Gather the token of each row; rows of padding are 0."""
    return jnp.concatenate([x, jnp.zeros_like(x[:1])])[routes.token]


def run_blocks(
    x: Float[Array, "tokens model"], routing: Routing, num_experts: int, run: RunExpert, sizes: tuple[int, ...]
) -> Float[Array, "tokens model"]:
    """Compute every token's sum of the outputs of its experts, weighted by its combine weights, float32.

    `sizes` are the block sizes, descending, each a multiple of the last. For few rows a small size wastes little; for
    many rows, large ones read each expert's weights fewer times.
    """
    tokens, k = routing.experts.shape
    routes = lay_out_routes(routing, num_experts, sizes[-1])
    rows = rows_of_routes(x, routes)
    out = jnp.zeros(
        (rows.shape[0] + 1, rows.shape[1]), jnp.float32
    )  # the last row stays 0, for routes without an expert
    begin, remaining = routes.begin, routes.length
    for size in sizes:
        blocks = remaining // size
        out = _run_size(rows, out, begin, blocks, size, run)
        begin, remaining = begin + blocks * size, remaining - blocks * size
    mixed = out[routes.row].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", mixed, routing.weights)


def _row_bound(routes: int, num_experts: int, unit: int) -> int:
    """Compute the largest number of rows that a routing needs: `unit - 1` rows of padding for every expert with a
    route."""
    return (routes + min(routes, num_experts) * (unit - 1)) // unit * unit


def _run_size(rows: Array, out: Array, begin: Array, blocks: Array, size: int, run: RunExpert) -> Array:
    """Run `blocks[e]` blocks of `size` rows for each expert e, from row `begin[e]` on."""
    last = jnp.cumsum(blocks, dtype=jnp.int32)

    def body(block: Array, out: Array) -> Array:
        expert = jnp.searchsorted(last, block, side="right").astype(jnp.int32)
        start = begin[expert] + (block - (last[expert] - blocks[expert])) * size
        result = run(jax.lax.dynamic_slice_in_dim(rows, start, size), expert)
        return jax.lax.dynamic_update_slice_in_dim(out, result, start, 0)

    return jax.lax.fori_loop(0, last[-1], body, out)
