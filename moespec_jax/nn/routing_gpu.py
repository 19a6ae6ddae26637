"""Routing of each token by one Triton kernel: softmax, the k most probable experts, and their normalisation.

In plain JAX these are a softmax, a sort, a sum, a quotient and selections, a launch each.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.routing import Routing, route

# Probabilities of one token, in the registers of one warp.
MOST_EXPERTS = 1024


def route_gpu(
    config: DecoderConfig,
    router: Float[Array, "experts model"],
    x: Float[Array, "tokens model"],
    valid: Bool[Array, " tokens"],
) -> tuple[Routing, Float[Array, "tokens experts"]]:
    """Compute `routing.route`: on NVIDIA GPUs with the kernel, elsewhere with plain operations."""

    def fused(router: Array, x: Array, valid: Array) -> tuple[Routing, Array]:
        logits = jnp.einsum("td,nd->tn", x, router, preferred_element_type=jnp.float32)
        experts, weights, probabilities = choose(config, logits, valid.astype(jnp.int32))
        return Routing(experts, weights), probabilities

    def plain(router: Array, x: Array, valid: Array) -> tuple[Routing, Array]:
        return route(config, router, x, valid)

    if config.num_experts > MOST_EXPERTS:
        return plain(router, x, valid)
    return jax.lax.platform_dependent(router, x, valid, cuda=fused, default=plain)


def choose(
    config: DecoderConfig,
    logits: Float[Array, "tokens experts"],
    valid: Int[Array, " tokens"],
    *,
    interpret: bool = False,
) -> tuple[Int[Array, "tokens active"], Float[Array, "tokens active"], Float[Array, "tokens experts"]]:
    """Compute experts, combine weights and probabilities of `routing.route` from the router's logits.

    A token whose logits are not finite has no expert.
    """
    (tokens, num_experts), k = logits.shape, config.num_experts_per_tok
    width, most = pl.next_power_of_2(num_experts), pl.next_power_of_2(k)

    def kernel(logits, valid, experts, weights, probabilities):
        token = pl.program_id(0)
        every, nth = jnp.arange(width, dtype=jnp.int32), jnp.arange(most, dtype=jnp.int32)
        inside = every < num_experts
        # Of padding, exp is 0.
        row = plgpu.load(logits.at[token, every], mask=inside, other=-jnp.inf)
        shares = jnp.exp(row - jnp.max(row, axis=0))
        shares = shares / jnp.sum(shares, axis=0)
        plgpu.store(probabilities.at[token, every], shares, mask=inside)

        def take(j, carry):
            left, chosen, values = carry
            best = jnp.max(left, axis=0)
            expert = jnp.min(jnp.where(left == best, every, num_experts), axis=0)
            left = jnp.where(every == expert, -1.0, left)
            return left, jnp.where(nth == j, expert, chosen), jnp.where(nth == j, best, values)

        nothing = jnp.full((most,), num_experts, jnp.int32), jnp.zeros((most,), jnp.float32)
        _, chosen, values = jax.lax.fori_loop(0, k, take, (jnp.where(inside, shares, -1.0), *nothing))
        if config.norm_topk_prob:
            total = jnp.sum(values, axis=0)
            values = values / jnp.where(total > 0, total, 1.0)
        used = (chosen < num_experts) & (valid[token] > 0)
        plgpu.store(experts.at[token, nth], jnp.where(used, chosen, num_experts), mask=nth < k)
        plgpu.store(weights.at[token, nth], jnp.where(used, values, 0.0), mask=nth < k)

    shape = jax.ShapeDtypeStruct
    return pl.pallas_call(
        kernel,
        grid=(tokens,),
        out_shape=(
            shape((tokens, k), jnp.int32),
            shape((tokens, k), jnp.float32),
            shape((tokens, num_experts), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="route",
    )(logits, valid)
