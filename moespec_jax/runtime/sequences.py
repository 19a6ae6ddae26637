"""Sequences of a state of decoding, on the host."""

import jax

from moespec_jax.decoding.logprobs import Logprobs
from moespec_jax.decoding.states import NO_TOKEN, DecodeState
from moespec_jax.errors import CheckpointError
from moespec_jax.parallel.processes import fetch


def fetch_sequences(decoding: DecodeState, count: int) -> list[list[int]]:
    """Copy the tokens of the first `count` sequences, those of the prompt first.

    Raises:
        CheckpointError: logits were not finite.
    """
    tokens, length = fetch(decoding.tokens)[:count], fetch(decoding.length)[:count]
    sequences = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
    if any(NO_TOKEN in sequence for sequence in sequences):
        raise CheckpointError(
            "expected finite logits; came NaN or infinity, from weights that are not finite (named by python -m"
            " convert.check --files) or from values too large for this dtype"
        )
    return sequences


def fetch_logprobs(decoding: DecodeState) -> Logprobs | None:
    """Copy the log-probabilities of all sequences, if they were asked for."""
    return jax.tree.map(fetch, decoding.logprobs)
