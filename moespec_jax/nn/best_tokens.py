"""The most probable tokens of the target in place of its logits, where draws depend on nothing else: devices that share
a vocabulary exchange the best token of each shard, not all logits."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.nn.decoder import Decoder, shard_logits, unembed
from moespec_jax.parallel.collectives import all_argmax


class BestTokens(NamedTuple):
    """The most probable token of every row.

    Fields:
        ids: token ids; the lowest among equals.
        logits: their logits, NaN where one of the row is NaN.
    """

    ids: Int[Array, "*rows"]
    logits: Float[Array, "*rows"]


def best_of(outputs: Float[Array, "*rows vocab"] | BestTokens) -> BestTokens:
    """Find the most probable token of every row of logits."""
    return outputs if isinstance(outputs, BestTokens) else BestTokens(*all_argmax(outputs, ()))


def highest_logit(outputs: Float[Array, "*rows vocab"] | BestTokens) -> Float[Array, "*rows"]:
    """Find the highest logit of every row; NaN where one of the row is NaN."""
    return outputs.logits if isinstance(outputs, BestTokens) else jnp.max(outputs, axis=-1)


def logits_or_best(
    params: Decoder, hidden: Float[Array, "*rows model"], *, best_suffices: bool
) -> Float[Array, "*rows vocab"] | BestTokens:
    """Compute logits or, where `best_suffices` and the vocabulary is sharded, their best tokens alone."""
    axes = params.sharding.vocabulary
    if not (best_suffices and axes):
        return unembed(params, hidden)
    return BestTokens(*all_argmax(shard_logits(params, hidden), axes))
