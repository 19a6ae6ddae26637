"""Tokens of one sequence before a draw: the prompt, what was generated, and the draft tree's path to the node."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class History(NamedTuple):
    """Tokens before a draw; those of a batch have a leading axis.

    Fields:
        tokens: token ids; what is behind the first `length` has no meaning.
        length: number of tokens, and so the position of the token that is drawn.
        prompt_length: number of them that are the prompt's.
    """

    tokens: Int[Array, "*batch slots"]
    length: Int[Array, "*batch"]
    prompt_length: Int[Array, "*batch"]


def extended(history: History, new: Int[Array, " path"], count: Int[Array, ""]) -> History:
    """Append the first `count` of some tokens to the history of one sequence."""
    index = jnp.arange(history.tokens.shape[0], dtype=jnp.int32) - history.length
    taken = new[jnp.clip(index, 0, new.shape[0] - 1)]
    tokens = jnp.where((index >= 0) & (index < count), taken, history.tokens)
    return history._replace(tokens=tokens, length=history.length + count)


def occurrences(history: History, vocab_size: int, start: int | Int[Array, ""] = 0) -> Int[Array, " vocab"]:
    """Count each token of the vocabulary among the tokens of one sequence from position `start` on."""
    place = jnp.arange(history.tokens.shape[0], dtype=jnp.int32)
    counted = (place >= start) & (place < history.length)
    return jnp.zeros((vocab_size,), jnp.int32).at[history.tokens].add(counted.astype(jnp.int32), mode="drop")
