"""Checks of a request: types of its arguments, where it is made, and by the model's settings."""

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.core import Tracer
from tokenizers import Encoding, Tokenizer

from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.errors import RequestError, shown_value, wrong_type
from moespec_jax.nn.backend import Backend


def is_whole_number(value: object) -> bool:
    """Test whether a value is an integer of Python, NumPy or JAX."""
    try:
        operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return False
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _is_tree(value: object) -> bool:
    return isinstance(value, TreeConfig | CostTable) or (isinstance(value, str) and value in ("default", "auto"))


def _are_whole_numbers(value: object) -> bool:
    return isinstance(value, Iterable) and all(map(is_whole_number, value))


# Of each argument a test, and what passes it; those that may also be None.
_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_path, "a directory or a hub id"),
    "draft_model": (_is_path, "a directory or a hub id"),
    "revision": (_is_text, "text"),
    "draft_revision": (_is_text, "text"),
    "draft_boundaries": (_are_whole_numbers, "whole numbers (2, 24, 45)"),
    "backend": (lambda value: isinstance(value, Backend), "a back-end, such as BACKENDS['slots']"),
    "check": (callable, "a function"),
    "max_new_tokens": (is_whole_number, "a whole number"),
    "seed": (is_whole_number, "a whole number"),
    "logprobs": (is_whole_number, "a whole number"),
    "samples": (is_whole_number, "a whole number"),
    "max_length": (is_whole_number, "a whole number"),
    "tree": (_is_tree, "a TreeConfig, 'default', 'auto' or None"),
    "budget": (lambda value: isinstance(value, Real | BudgetConfig), "a number or a BudgetConfig"),
    "simulate_accept_length": (_is_number, "a number"),
    "adapt": (callable, "a function"),
    "on_tokens": (callable, "a function"),
    "on_round": (callable, "a function"),
}
_REQUIRED = ("model", "max_new_tokens", "seed", "samples")


def check_types(**arguments: object) -> None:
    """Check types of arguments of `load` and `generate`, by their names.

    Raises:
        RequestError: one has another type.
    """
    for name, value in arguments.items():
        fits, expected = _EXPECTED[name]
        if not (fits(value) or (value is None and name not in _REQUIRED)):
            raise wrong_type(name, expected, value)


def check_ranges(config: DecoderConfig, seed: int, logprobs: int | None) -> None:
    """Check a seed and a number of log-probabilities.

    Raises:
        RequestError: one is out of its range.
    """
    if not 0 <= seed < 2**32:
        raise RequestError(f"expected a seed from 0 to {2**32 - 1}, got {seed}")
    if logprobs is not None and not 0 <= logprobs <= config.vocab_size:
        raise RequestError(f"expected logprobs from 0 to the vocabulary's {config.vocab_size} tokens, got {logprobs}")


def are_messages(prompts: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Test whether prompts are messages of one conversation."""
    return isinstance(prompts, list | tuple) and len(prompts) > 0 and all(isinstance(p, Mapping) for p in prompts)


def listed_prompts(prompts: object) -> list[str | list[int]]:
    """List prompts: texts, and token ids as integers of Python.

    Raises:
        RequestError: they are neither a text nor a list of texts or of lists of whole numbers.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise wrong_type("prompts", "text, or a list of texts or of lists of token ids", prompts)
    given = list(prompts)
    if any(map(is_whole_number, given)):
        raise RequestError("expected a list of prompts; for one prompt of token ids, wrap it: [[5, 17, 9]]")
    return [prompt if isinstance(prompt, str) else _ids(number, prompt) for number, prompt in enumerate(given)]


def _ids(number: int, prompt: object) -> list[int]:
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise wrong_type(f"prompt {number}", "text or a list of token ids", prompt)
    ids = list(prompt)
    for i in ids:
        if not is_whole_number(i):
            raise RequestError(f"expected token ids as whole numbers; prompt {number} holds {shown_value(i)}")
    return [operator.index(i) for i in ids]


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
    # An absent platform is an error of its own (`errors.py`), not of the array made next.
    jax.devices()
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
