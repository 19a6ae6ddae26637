"""Prompt cache: the state after a generation, so that a longer prompt that begins alike reads only its new tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.method import Prefill


class Resumed(NamedTuple):
    """State of prefill to go on from.

    Fields:
        state: as after reading the first `start` tokens of every prompt; its buffers may hold more.
        start: number of tokens that need not be read.
        slots: capacity of its buffers.
    """

    state: Any
    start: int
    slots: int


class PromptCache:
    """Keys and values of the last generation, for the next one (`Model.generate(prompt_cache=...)`).

    A conversation is its use: every prompt is the one before with its answer and a further turn. The output is the same
    as without it, except for the rounding of passes of other sizes. After another model, drafter, mesh, tree, budget or
    number of prompts, or an interruption, everything is read again.
    """

    def __init__(self) -> None:
        self._source: object = None
        self._prefill: Prefill[Any, Any] | None = None
        self._state: Any = None
        self._slots = 0
        self._kept: list[list[int]] = []

    def begin(self, source: object) -> None:
        """Empty the cache unless its state comes from the same `source`."""
        if source != self._source:
            self._source, self._state = source, None

    def keep(self, prefill: Prefill[Any, Any], state: Any, slots: int, kept: list[list[int]]) -> None:
        """Keep a state of prefill that holds the first tokens of every sequence, `kept`."""
        self._prefill, self._state, self._slots, self._kept = prefill, state, slots, kept

    def take(self, prefill: Prefill[Any, Any], prompts: Sequence[Sequence[int]]) -> Resumed | None:
        """Return the state for prompts that begin as the kept sequences do; the cache is then empty, since a state is
        donated to the programs that change it."""
        state, self._state = self._state, None
        if state is None or prefill != self._prefill or len(prompts) != len(self._kept):
            return None
        # A draft head reads a token together with the one after it, which must be the same, too.
        start = min(_common(prompt, kept) for prompt, kept in zip(prompts, self._kept, strict=True)) - 1
        return Resumed(state, start, self._slots) if start > 0 else None


def usable(cache: PromptCache | None, config: DecoderConfig, source: object) -> PromptCache | None:
    """Return the cache, emptied unless its state comes from the same `source`, which is what rows depend on beside the
    tokens: exact output never begins with rows of a budget. None where a prompt's rows depend on the text after it."""
    if cache is None or config.rope.rope_type == "dynamic":
        return None
    cache.begin(source)
    return cache


def _common(prompt: Sequence[int], kept: Sequence[int]) -> int:
    """Number of first tokens that are the same."""
    places = (place for place, (a, b) in enumerate(zip(prompt, kept, strict=False)) if a != b)
    return next(places, min(len(prompt), len(kept)))
