"""States of a batch of sequences: while prompts are read, and while tokens are generated."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.history import History
from moespec_jax.decoding.logprobs import Logprobs, record
from moespec_jax.decoding.slots import write_slots
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import data_axes, pmax

# In place of a token where logits are not finite; no token has this id.
NO_TOKEN = -1


class Prompts(NamedTuple):
    """A batch of prompts, and where each sequence ends.

    Fields:
        tokens: token ids, padded on the right to the capacity of a sequence.
        lengths: number of tokens of each prompt.
        limit: length at which a sequence ends, in tokens.
        stop_ids: token ids that end a sequence, padded with `NO_TOKEN`.
        key: random key of the whole batch.
    """

    tokens: Int[Array, "batch slots"]
    lengths: Int[Array, " batch"]
    limit: Int[Array, " batch"]
    stop_ids: Int[Array, " stops"]
    key: Array


class PrefillState(NamedTuple):
    """State that one chunk of a prompt leaves to the next.

    Fields:
        cache: the target's KV cache.
        last_hidden: final hidden state of each prompt's last token, once it has been read.
    """

    cache: Cache
    last_hidden: Float[Array, "batch model"]


@struct.dataclass
class DecodeState:
    """A batch of sequences under way.

    Fields:
        tokens: prompts and everything generated.
        length: number of tokens of each sequence.
        prompt_length: number of them that are the prompt's.
        limit: length at which a sequence ends.
        done: sequences that have ended, at a stop id or at their limit.
        stop_ids: token ids that end a sequence.
        key: random key of the whole batch.
        cache: the target's KV cache, which holds every token but the newest.
        logprobs: of the generated tokens, where they are asked for.
    """

    tokens: Int[Array, "batch slots"]
    length: Int[Array, " batch"]
    prompt_length: Int[Array, " batch"]
    limit: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    stop_ids: Int[Array, " stops"]
    key: Array
    cache: Cache
    logprobs: Logprobs | None = None

    __repr__ = summary

    @property
    def histories(self) -> History:
        """Tokens of every sequence before the next draw."""
        return History(self.tokens, self.length, self.prompt_length)

    @property
    def newest(self) -> Int[Array, "batch 1"]:
        """Newest token of every sequence, which is not in the cache; the root of the next draft tree."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)


def any_unfinished(state: DecodeState) -> Bool[Array, ""]:
    """Test whether any sequence of the whole batch is unfinished; devices that share a batch loop equally often."""
    return pmax(~jnp.all(state.done), data_axes())


def append_tokens(
    state: DecodeState,
    new: Int[Array, "batch path"],
    count: Int[Array, " batch"],
    logits: Float[Array, "batch path vocab"] | None = None,
) -> DecodeState:
    """Append the first `count[b]` of `new[b]` to every unfinished sequence b, cut after its first stop id or at its
    limit, where plain decoding would have stopped. Where log-probabilities are asked for, they are those of `logits`,
    which the tokens were drawn from."""
    width = new.shape[1]
    step = jnp.arange(width, dtype=jnp.int32)[None, :]
    stops = jnp.any(new[:, :, None] == state.stop_ids[None, None, :], axis=-1)
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, width)
    room = jnp.maximum(state.limit - state.length, 0)
    count = jnp.where(state.done, 0, jnp.minimum(jnp.minimum(count, until_stop), room))
    stopped = jnp.any(stops & (step < count[:, None]), axis=1)
    length, logprobs = state.length + count, state.logprobs
    if logprobs is not None:
        assert logits is not None
        logprobs = record(logprobs, new, logits, state.length, count)
    return dataclasses.replace(
        state,
        tokens=write_slots(state.tokens, new, state.length, count),
        length=length,
        done=state.done | stopped | (length >= state.limit),
        logprobs=logprobs,
    )
