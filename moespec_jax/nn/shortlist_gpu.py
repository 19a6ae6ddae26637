"""A layer's routing under an expert budget by one Triton kernel, for rules that rank experts by their scores alone and
send every row to its best experts inside the shortlist. In plain operations these are nine launches.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.nn.routing import Restricted, Routing

# Probabilities of all rows are in the registers of one thread block.
MOST_ROWS, MOST_EXPERTS = 64, 128


def shortlist_gpu(
    plain: Callable[..., Restricted],
    credit: Callable[[Array, Array, Array], Array],
    norm_topk_prob: bool,
    slots: int,
    row_weight: Float[Array, " rows"],
    most: Int[Array, ""],
    probabilities: Float[Array, "rows experts"],
    natural: Routing,
    valid: Bool[Array, " rows"],
) -> Restricted:
    """Compute `plain` of the arguments after `slots`: on NVIDIA GPUs with the kernel where rows and experts are few.
    Other arguments are those of `fused_shortlist`."""
    rows, experts = probabilities.shape
    arguments = (row_weight, most, probabilities, natural, valid)
    if rows > MOST_ROWS or experts > MOST_EXPERTS:
        return plain(*arguments)
    fused = partial(fused_shortlist, credit, norm_topk_prob, slots)
    return jax.lax.platform_dependent(*arguments, cuda=fused, default=plain)


def fused_shortlist(
    credit: Callable[[Array, Array, Array], Array],
    norm_topk_prob: bool,
    slots: int,
    row_weight: Float[Array, " rows"],
    most: Int[Array, ""],
    probabilities: Float[Array, "rows experts"],
    natural: Routing,
    valid: Bool[Array, " rows"],
    *,
    interpret: bool = False,
) -> Restricted:
    """Compute `budget.restrict` without anchor and pruning, of fixed size, substituting.

    Args:
        credit: what a row contributes to the score of each expert: elementwise, of (probabilities, whether the row
            selected the expert, combine weights).
        norm_topk_prob: whether combine weights are renormalised.
        slots: number of slots of the shortlist.
        row_weight: weight of each row in the scores.
        most: number of experts of the shortlist, at least the k of a row.
        probabilities: the router's softmax.
        natural: routing without a budget.
        valid: rows that are still in the tree.
        interpret: whether to interpret the kernel, on any platform.
    """
    (rows, num_experts), k = probabilities.shape, natural.experts.shape[1]
    height, width, length = (pl.next_power_of_2(size) for size in (rows, num_experts, k))

    def kernel(row_weight, most, probabilities, own, own_weights, valid, experts, weights, shortlist, mass, replaced):
        row, every, nth = (jnp.arange(size, dtype=jnp.int32) for size in (height, width, length))
        here, real = row < rows, every < num_experts
        both = here[:, None] & real[None, :]
        shares = plgpu.load(probabilities.at[row[:, None], every[None, :]], mask=both, other=0.0)

        combine = jnp.zeros((height, width), jnp.float32)
        for j in range(k):  # without a loop: every load of a loop would wait for the one before
            expert = plgpu.load(own.at[row, j], mask=here, other=num_experts)
            weight = plgpu.load(own_weights.at[row, j], mask=here, other=0.0)
            combine += jnp.where(expert[:, None] == every[None, :], weight[:, None], 0.0)
        selected = combine > 0
        factor = plgpu.load(row_weight.at[row], mask=here, other=0.0)
        scores = jnp.sum(jnp.where(both, credit(shares, selected, combine) * factor[:, None], 0.0), axis=0)
        # Padding comes after all experts; the lower id is first among equals.
        ranked = jnp.where(real, scores, -1.0)
        above, equal = ranked[:, None] > ranked[None, :], ranked[:, None] == ranked[None, :]
        before = above | (equal & (every[:, None] < every[None, :]))
        rank = jnp.sum(before.astype(jnp.int32), axis=0)
        inside = real & (rank < most[0])
        # Slots that are not used, and experts that have none, are apart: no two threads write the same place.
        plgpu.store(shortlist.at[rank], jnp.where(inside, every, num_experts), mask=real & (rank < slots))
        total = jnp.sum(scores, axis=0)
        mass[0] = jnp.sum(jnp.where(inside, scores, 0.0), axis=0) / jnp.where(total > 0, total, 1.0)
        lost = jnp.max((selected & ~inside[None, :]).astype(jnp.int32), axis=1)
        plgpu.store(replaced.at[row], lost, mask=here)

        chosen, values = _best(jnp.where(inside[None, :], shares, -1.0), num_experts, k)
        kept = plgpu.load(valid.at[row], mask=here, other=0) > 0
        used = kept[:, None] & (chosen < num_experts) & (values >= 0)
        values = jnp.where(used, values, 0.0)
        if norm_topk_prob:
            sums = jnp.sum(values, axis=1)
            values = values / jnp.where(sums > 0, sums, 1.0)[:, None]
        target, mask = (row[:, None], nth[None, :]), here[:, None] & (nth < k)[None, :]
        plgpu.store(experts.at[target], jnp.where(used, chosen, num_experts), mask=mask)
        plgpu.store(weights.at[target], values, mask=mask)

    def shape(dtype: jax.typing.DTypeLike, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    experts, weights, shortlist, mass, replaced = pl.pallas_call(
        kernel,
        out_shape=(
            shape(jnp.int32, rows, k),
            shape(jnp.float32, rows, k),
            shape(jnp.int32, slots),
            shape(jnp.float32, 1),
            shape(jnp.int32, rows),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="shortlist",
    )(row_weight, most[None], probabilities, natural.experts, natural.weights, valid.astype(jnp.int32))
    routing = Routing(experts, weights, max_distinct=slots)
    return Restricted(routing, shortlist, mass[0], replaced > 0, valid)


def _best(left: Array, num_experts: int, k: int) -> tuple[Array, Array]:
    """Take the k largest of every row, which are at least 0, and their ids, the lower one first among equals; padded to
    a power of two."""
    height, width = left.shape
    every, nth = (jnp.arange(size, dtype=jnp.int32)[None, :] for size in (width, pl.next_power_of_2(k)))

    def take(j, carry):
        left, chosen, values = carry
        best = jnp.max(left, axis=1)[:, None]
        expert = jnp.min(jnp.where(left == best, every, num_experts), axis=1)[:, None]
        left = jnp.where(every == expert, -1.0, left)
        return left, jnp.where(nth == j, expert, chosen), jnp.where(nth == j, best, values)

    none = jnp.full((height, nth.shape[1]), num_experts, jnp.int32)
    return jax.lax.fori_loop(0, k, take, (left, none, jnp.zeros(none.shape, jnp.float32)))[1:]
