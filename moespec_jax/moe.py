"""Mixture-of-Experts block: route, run the chosen experts, combine. Over flattened tokens, one layer at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.layers import GatedMlp, gated_mlp


@struct.dataclass
class SparseMlp:
    """What a sparse layer has besides its experts, which live apart because back-ends lay them out differently."""

    router: Float[Array, "experts model"]
    shared: GatedMlp | None = None
    shared_gate: Float[Array, "1 model"] | None = None


class Routing(NamedTuple):
    """Which experts each token goes to and with what weight. An expert id of `num_experts` means none."""

    experts: Int[Array, "tokens active"]
    weights: Float[Array, "tokens active"]


class RouterInfo(NamedTuple):
    """What a person wants to know about one routing decision: softmax over all experts, and the ids chosen."""

    probabilities: Float[Array, "tokens experts"]
    experts: Int[Array, "tokens active"]


# Runs x [tokens, model] through the routed experts of one sparse layer (experts, layer, x, routing) -> [tokens, model]
ExpertCompute = Callable[[object, "int | Array", Array, Routing], Array]


def route(
    config: DecoderConfig,
    router: Float[Array, "experts model"],
    x: Float[Array, "tokens model"],
    valid: Bool[Array, " tokens"],
) -> tuple[Routing, Float[Array, "tokens experts"]]:
    """Softmax over all experts, the k most probable, renormalised if the model does (`norm_topk_prob`).

    Tokens that are not `valid` (padding, finished sequences) go to no expert, so that they cost no weight reads.
    """
    logits = jnp.einsum("td,nd->tn", x, router, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    nobody = jnp.int32(config.num_experts)
    routing = Routing(
        jnp.where(valid[:, None], experts.astype(jnp.int32), nobody), jnp.where(valid[:, None], weights, 0.0)
    )
    return routing, probabilities


def sparse_mlp(
    config: DecoderConfig,
    mlp: SparseMlp,
    experts: object,
    layer: int | Array,
    x: Float[Array, "tokens model"],
    valid: Bool[Array, " tokens"],
    compute: ExpertCompute,
) -> tuple[Float[Array, "tokens model"], RouterInfo]:
    """One sparse layer's feed-forward block; `layer` counts sparse layers only, as `experts` does."""
    routing, probabilities = route(config, mlp.router, x, valid)
    y = compute(experts, layer, x, routing).astype(x.dtype)
    if mlp.shared is not None and mlp.shared_gate is not None:
        gate = jax.nn.sigmoid(jnp.einsum("td,od->to", x, mlp.shared_gate))
        y = y + gate * gated_mlp(x, mlp.shared, config.hidden_act)
    return y, RouterInfo(probabilities, routing.experts)
