"""The distinct experts of a few tokens, and the sums of their outputs, by one Triton kernel each.

In plain JAX the list is a comparison, two reductions, a sort and two selections, a launch each, and the sum reads the
outputs of every expert for every token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moespec_jax.nn.routing import Routing

# Columns of a thread block that sums.
COLUMNS = 256


def list_distinct(
    routing: Routing, num_experts: int, *, interpret: bool = False
) -> tuple[Int[Array, " slots"], Int[Array, "tokens active"]]:
    """List the experts that any token uses, ascending, `num_experts` in unused slots; and the slot of each token's
    experts, the number of slots where there is no expert.

    There are min(tokens * k, experts) slots, or fewer under a budget (`Routing.max_distinct`).
    """
    tokens, k = routing.experts.shape
    slots = min(tokens * k, num_experts, routing.max_distinct or num_experts)
    height, width, length = (pl.next_power_of_2(n) for n in (tokens, num_experts, slots))

    def kernel(experts, ids, places):
        token, every = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
        inside = token < tokens

        # Without a loop: every load of a loop would wait for the one before.
        chosen = [plgpu.load(experts.at[token, j], mask=inside, other=num_experts) for j in range(k)]
        matches = [(expert[:, None] == every[None, :]) & (every < num_experts)[None, :] for expert in chosen]
        used = jnp.max(functools.reduce(jnp.logical_or, matches).astype(jnp.int32), axis=0)
        # Experts that are not used have a slot that is not written.
        slot = jnp.where(used > 0, jnp.cumsum(used, dtype=jnp.int32) - 1, slots)
        plgpu.store(ids.at[slot], every, mask=slot < slots)
        rest = jnp.arange(length, dtype=jnp.int32)
        unused = (rest >= jnp.sum(used, dtype=jnp.int32)) & (rest < slots)
        plgpu.store(ids.at[rest], jnp.full((length,), num_experts, jnp.int32), mask=unused)

        for j, match in enumerate(matches):
            plgpu.store(places.at[token, j], jnp.min(jnp.where(match, slot[None, :], slots), axis=1), mask=inside)

    return pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct((slots,), jnp.int32), jax.ShapeDtypeStruct((tokens, k), jnp.int32)),
        compiler_params=plgpu.CompilerParams(num_warps=4 if width <= 128 else 8, num_stages=1),
        interpret=interpret,
        name="list_experts",
    )(routing.experts)


def sum_places(
    out: Float[Array, "slots tokens model"],
    places: Int[Array, "tokens active"],
    weights: Float[Array, "tokens active"],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "tokens model"]:
    """Sum every token's rows of the slots at its `places` by its combine weights, in float32, rounded to `dtype`. Other
    rows, and slots of weight 0, are not read."""
    (slots, tokens, model), k = out.shape, places.shape[1]

    def kernel(out, places, weights, total):
        token, nth = pl.program_id(0), jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
        column = pl.program_id(1) * COLUMNS + jnp.arange(COLUMNS, dtype=jnp.int32)
        place = plgpu.load(places.at[token, nth], mask=nth < k, other=slots)
        weight = plgpu.load(weights.at[token, nth], mask=nth < k, other=0.0)
        used = ((place < slots) & (weight > 0))[:, None] & (column < model)[None, :]
        rows = plgpu.load(out.at[place[:, None], token, column[None, :]], mask=used, other=0.0)
        mixed = jnp.sum(jnp.where(used, rows * weight[:, None], 0.0), axis=0)
        plgpu.store(total.at[token, column], mixed.astype(dtype), mask=column < model)

    return pl.pallas_call(
        kernel,
        grid=(tokens, -(-model // COLUMNS)),
        out_shape=jax.ShapeDtypeStruct((tokens, model), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sum_experts",
    )(out, places, weights)
