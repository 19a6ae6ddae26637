"""Stop strings: texts at whose first occurrence in a continuation it ends."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from moespec_jax.checkpoint.tokenizer import TextStream
from moespec_jax.errors import RequestError, wrong_type
from moespec_jax.runtime.run import OnTokens


class Stopped(NamedTuple):
    """Where a continuation ends.

    Fields:
        tokens: number of new tokens, the one that completes the stop string included.
        text: its text before the stop string.
    """

    tokens: int
    text: str


class StopStrings:
    """Search of the texts of a batch, while they are generated.

    Fields:
        stopped: where each continuation ends; None where no stop string was found.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> None:
        self._strings, self._longest = strings, max(map(len, strings))
        self._streams = [TextStream(tokenizer) for _ in prompts]
        self._texts, self._tokens = [""] * len(prompts), [0] * len(prompts)
        self.stopped: list[Stopped | None] = [None] * len(prompts)
        for stream, prompt in zip(self._streams, prompts, strict=True):
            stream.push(prompt)

    def all_stopped(self) -> bool:
        """Test whether every continuation has ended."""
        return None not in self.stopped

    def before(self, on_tokens: OnTokens | None) -> OnTokens:
        """Make a function that searches new tokens, and passes on those before the end of each continuation."""

        def search(new: list[list[int]]) -> None:
            kept = [self._search(number, ids) for number, ids in enumerate(new)]
            if on_tokens is not None:
                on_tokens(kept)

        return search

    def _search(self, number: int, new: list[int]) -> list[int]:
        """Append new tokens of one continuation; return those that belong to it."""
        for count, token in enumerate(new):
            if self.stopped[number] is not None:
                return new[:count]
            self._append(number, token)
        return new

    def _append(self, number: int, token: int) -> None:
        start = max(0, len(self._texts[number]) - self._longest + 1)
        text = self._texts[number] = self._texts[number] + self._streams[number].push([token])
        self._tokens[number] += 1
        found = [at for string in self._strings if (at := text.find(string, start)) >= 0]
        if found:
            self.stopped[number] = Stopped(self._tokens[number], text[: min(found)])


def printable(text: str, strings: Sequence[str]) -> int:
    """Number of characters of a text that no stop string can begin in: up to the first one, or to the longest end that
    may become one."""
    found = [at for string in strings if (at := text.find(string)) >= 0]
    if found:
        return min(found)
    ends = [length for string in strings for length in range(1, len(string)) if text.endswith(string[:length])]
    return len(text) - max(ends, default=0)


def listed_stops(stop: object, tokenizer: Tokenizer | None) -> list[str]:
    """List stop strings.

    Raises:
        RequestError: they are neither a text nor a list of texts, one is empty, or there is no tokenizer.
    """
    if stop is None:
        return []
    strings = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, list | tuple) else [None]
    if not all(isinstance(string, str) for string in strings):
        raise wrong_type("stop", "text, or a list of texts", stop)
    if not all(strings):
        raise RequestError("expected stop strings of at least one character; one is empty")
    if strings and tokenizer is None:
        raise RequestError("expected a model with a tokenizer for stop strings; it has none")
    return [string for string in strings if string is not None]
