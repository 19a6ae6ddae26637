"""What draft heads have in common between rounds: a cache of their own, and hidden states of the target that wait until
the head reads them, those of the newest tokens (`drafter.Drafter.commit` and `skip`)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.state_specs import BY_SEQUENCE, cache_specs
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.summary import summary


@struct.dataclass
class HeadState:
    """State of a draft head between rounds.

    Fields:
        cache: keys and values of what the head has read; `cache.length[b]` counts its rows.
        aux: the target's hidden states of the tokens from position `skipped[b] + cache.length[b]` to the root's
            predecessor, which the head has not read yet.
        skipped: number of tokens that are missing in the cache: where many are drawn without a draft, the head reads
            only the last ones.
    """

    cache: Cache
    aux: Float[Array, "batch path aux"]
    skipped: Int[Array, " batch"]

    __repr__ = summary


class HeadDrafter:
    """A drafter with a head and a `HeadState`; reading and drafting are left to the subclass."""

    def commit(
        self, state: HeadState, accepted: Accepted, aux_hidden_states: Float[Array, "batch nodes aux"] | None
    ) -> HeadState:
        """Keep the target's hidden states of the accepted path."""
        assert aux_hidden_states is not None
        return dataclasses.replace(state, aux=keep_path(state.aux, accepted, aux_hidden_states))

    def skip(
        self, state: HeadState, position: Int[Array, " batch"], aux_hidden_states: Float[Array, "batch 1 aux"] | None
    ) -> HeadState:
        """Append the hidden states to those that wait; where there is no room, the oldest are dropped."""
        assert aux_hidden_states is not None
        waiting = position - state.skipped - state.cache.length
        aux, dropped = append_row(state.aux, waiting, aux_hidden_states)
        return dataclasses.replace(state, aux=aux, skipped=state.skipped + dropped)

    def kept(self, state: HeadState) -> Int[Array, " batch"]:
        """Rows of the cache; none where some are missing."""
        return jnp.where(state.skipped == 0, state.cache.length, 0)

    def resume(self, state: HeadState) -> HeadState:
        """Keep the cache."""
        return HeadState(state.cache, state.aux[:, :1], jnp.zeros_like(state.skipped))

    def specs(self, params: SpeculativeParams[Any]) -> HeadState:
        """Sharding of the state on a mesh."""
        cache = cache_specs(params.draft.sharding, stacked=False)
        return HeadState(cache, BY_SEQUENCE, BY_SEQUENCE)  # pyright: ignore[reportArgumentType]


def keep_path(
    waiting: Float[Array, "batch rows aux"], accepted: Accepted, aux_hidden_states: Float[Array, "batch nodes aux"]
) -> Float[Array, "batch rows aux"]:
    """Replace what waits by the hidden states of the accepted path."""
    aux = jnp.take_along_axis(aux_hidden_states, accepted.path[:, :, None], axis=1)
    # Longer where other shapes of a menu have longer paths.
    return jnp.pad(aux, ((0, 0), (0, waiting.shape[1] - aux.shape[1]), (0, 0)))


def append_row(
    waiting: Float[Array, "batch rows aux"], count: Int[Array, " batch"], row: Float[Array, "batch 1 aux"]
) -> tuple[Float[Array, "batch rows aux"], Int[Array, " batch"]]:
    """Append a row to the first `count[b]`; where there is no room, the oldest is dropped, which is counted too."""
    width = waiting.shape[1]
    is_full = count >= width
    waiting = jnp.where(is_full[:, None, None], jnp.roll(waiting, -1, axis=1), waiting)
    is_new = jnp.arange(width, dtype=jnp.int32)[None, :] == jnp.minimum(count, width - 1)[:, None]
    return jnp.where(is_new[:, :, None], row, waiting), is_full.astype(jnp.int32)
