"""Checks of a request: where it is made, and by the model's settings."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from tokenizers import Encoding, Tokenizer

from moespec_jax.config import DecoderConfig
from moespec_jax.errors import RequestError


def known_ids(config: DecoderConfig, tokenizer: Tokenizer, encoding: Encoding) -> list[int]:
    """Return the ids of a text. Some tokenizers have tokens, often `<pad>`, for which the embedding has no row.

    Raises:
        RequestError: the text has such a token.
    """
    largest = max(encoding.ids, default=0)
    if largest >= config.vocab_size:
        raise RequestError(
            f"expected tokens with ids below the model's vocabulary of {config.vocab_size}; the tokenizer has"
            f" {tokenizer.id_to_token(largest)!r} as {largest}"
        )
    return encoding.ids


def check_not_traced(function: str, *values: object) -> None:
    """Check that `function` is called outside a transformation of JAX, and with concrete `values`.

    Raises:
        RequestError: it is not.
    """
    # Inside `jax.jit` every operation gives a tracer; inside `grad` and `vmap` alone, only those on their arguments.
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((values, jnp.zeros(())))):
        raise RequestError(
            f"expected {function} outside of jax.jit, grad and vmap, since it works on the host and compiles programs"
            " of its own; inside, use nn.decoder.forward (docs/forward_pass.md) or the methods of Speculative"
            " (docs/extending.md)"
        )


def sequence_limits(
    config: DecoderConfig, ids: Sequence[Sequence[int]], max_new_tokens: int, max_length: int | None
) -> list[int]:
    """Compute the length at which each sequence ends at the latest, in tokens.

    Raises:
        RequestError: a prompt is empty, holds an unknown id or fills the context, or a number is out of range.
    """
    context = config.context_length
    if not ids:
        raise RequestError("expected at least one prompt")
    if max_new_tokens < 1:
        raise RequestError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
    if max_length is not None and not 1 < max_length <= context:
        raise RequestError(f"expected max_length from 2 to the model's context of {context}, got {max_length}")
    context = max_length or context
    for number, prompt in enumerate(ids):
        if not prompt:
            raise RequestError(f"expected a prompt of at least one token; prompt {number} is empty")
        if len(prompt) >= context:
            raise RequestError(
                f"expected a prompt shorter than the context of {context} tokens; prompt {number} has {len(prompt)}"
            )
        for i in prompt:
            if not 0 <= i < config.vocab_size:
                raise RequestError(f"expected token ids from 0 to {config.vocab_size - 1}; prompt {number} holds {i}")
    return [min(len(prompt) + max_new_tokens, context) for prompt in ids]
