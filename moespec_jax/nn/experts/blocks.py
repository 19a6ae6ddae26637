"""Rows sorted by expert and run in fixed-size blocks: the cost follows the routed tokens, not tokens x experts.

Routes (a token paired with one of its experts) are laid out expert by expert, each expert's rows padded up to a
multiple of the smallest block size, and then covered by blocks of a few static sizes, a traced number of each. Example,
sizes 4 and 2, experts a, b, c with 5, 0 and 1 routes, padding shown as dots:

    rows      a a a a a . c .
    size 4    1 1 1 1
    size 2            1 1 2 2
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.nn.routing import Routing

# Runs `rows` `[block, model]` through one expert (traced id) and returns `[block, model]` float32.
RunExpert = Callable[[Array, Array], Array]


class PaddedRoutes(NamedTuple):
    """Routes laid out by expert. `tokens` in `token` marks padding; a route to nobody has the row after the last."""

    token: Int[Array, " rows"]
    row: Int[Array, " routes"]
    begin: Int[Array, " experts"]
    length: Int[Array, " experts"]


def lay_out_routes(routing: Routing, num_experts: int, unit: int) -> PaddedRoutes:
    """Which token each row holds, which row each route of each token got, and each expert's range of rows.

    Gathers only: a scatter of this kind is slow on accelerators, and some TPU compilers refuse it beside a sort.
    """
    tokens, k = routing.experts.shape
    flat = routing.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32), side="left").astype(jnp.int32)
    first, count = bounds[:-1], bounds[1:] - bounds[:-1]
    length = (count + unit - 1) // unit * unit
    end = jnp.cumsum(length, dtype=jnp.int32)
    begin = end - length
    rows = jnp.arange(_row_bound(tokens * k, num_experts, unit), dtype=jnp.int32)
    owner = jnp.clip(jnp.searchsorted(end, rows, side="right"), 0, num_experts - 1).astype(jnp.int32)
    within = rows - begin[owner]
    route = order[jnp.clip(first[owner] + within, 0, tokens * k - 1)]
    expert = jnp.clip(flat, 0, num_experts - 1)
    rank = jnp.argsort(order).astype(jnp.int32)
    token = jnp.where(within < count[owner], route // k, tokens)
    row = jnp.where(flat < num_experts, begin[expert] + rank - first[expert], rows.size)
    return PaddedRoutes(token, row, begin, length)


def run_blocks(
    x: Float[Array, "tokens model"], routing: Routing, num_experts: int, run: RunExpert, sizes: tuple[int, ...]
) -> Float[Array, "tokens model"]:
    """Every token through its experts, weighted and summed, float32.

    `sizes` are the block sizes, descending, each a multiple of the last. Few rows want a small size, which wastes
    little; many rows want large ones too, which read each expert's weights fewer times.
    """
    tokens, k = routing.experts.shape
    routes = lay_out_routes(routing, num_experts, sizes[-1])
    rows = jnp.concatenate([x, jnp.zeros_like(x[:1])])[routes.token]
    out = jnp.zeros((rows.shape[0] + 1, rows.shape[1]), jnp.float32)  # the last row stays 0: it is nobody's
    begin, left = routes.begin, routes.length
    for size in sizes:
        blocks = left // size
        out = _run_size(rows, out, begin, blocks, size, run)
        begin, left = begin + blocks * size, left - blocks * size
    mixed = out[routes.row].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", mixed, routing.weights)


def _row_bound(routes: int, num_experts: int, unit: int) -> int:
    """The most rows any routing can need: every expert that has a route may need `unit - 1` rows of padding."""
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
