"""Stop strings: texts at whose first occurrence in a continuation it ends."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from moespec_jax.checkpoint.tokenizer import TextStream
from moespec_jax.errors import RequestError, wrong_type
from moespec_jax.runtime.run import OnTokens


class Stopped(NamedTuple):
    """End of a continuation.

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


class VisibleText:
    """Text of one continuation while it is generated: nothing from a stop string on, and no end that may become one.

    Fields:
        prompt: text of the prompt, once tokens follow it; ids of the prompt are not checked before.
        text: what was returned so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], strings: Sequence[str]) -> None:
        self._stream, self._strings, self._held = TextStream(tokenizer), strings, ""
        self._unread, self.prompt, self.text = prompt, "", ""

    def push(self, ids: Sequence[int]) -> str:
        """Append tokens; return the text that they complete."""
        self.prompt += self._stream.push(self._unread)
        self._unread = ()
        self._held += self._stream.push(ids)
        return self._release(printable(self._held, self._strings))

    def finish(self) -> str:
        """Return the rest of the text at the end."""
        self._held += self._stream.flush()
        stopped = any(string in self._held for string in self._strings)
        return self._release(printable(self._held, self._strings) if stopped else len(self._held))

    def _release(self, count: int) -> str:
        new, self._held = self._held[:count], self._held[count:]
        self.text += new
        return new


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
    given = [stop] if isinstance(stop, str) else stop
    if not isinstance(given, list | tuple) or not all(isinstance(string, str) for string in given):
        raise wrong_type("stop", "text, or a list of texts", stop)
    if not all(given):
        raise RequestError("expected stop strings of at least one character; one is empty")
    if given and tokenizer is None:
        raise RequestError("expected a model with a tokenizer for stop strings; it has none")
    return list(given)
