"""Places of the assistant's answers in the text of a conversation."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from moespec_jax.checkpoint.chat import MARK, Rendered, attempt, changed
from moespec_jax.checkpoint.conversation import Conversation


def answer_spans(directory: Path, rendered: Rendered, answers: Sequence[int]) -> list[tuple[int, int]]:
    """Find where answers begin and end in a rendered conversation, with what the template closes them with.

    An answer that the template rewrites (of earlier turns, some remove the thinking) has no place.

    Args:
        directory: of the checkpoint.
        rendered: the whole conversation.
        answers: indices of the assistant's turns.
    """
    places = _Places(directory, rendered)
    return [span for i in answers if (span := places.span(i)) is not None]


class _Places:
    """Places of turns in a rendered conversation.

    The text before and after a turn, rendered alone, is usually a prefix of the whole text. Where it is not, because
    the template refuses the part or renders earlier turns differently, the place is where a mark appears that takes the
    place of the turn's content.
    """

    def __init__(self, directory: Path, rendered: Rendered):
        self._directory = directory
        self._conversation, self._text = rendered

    def span(self, i: int) -> tuple[int, int] | None:
        before, after = self._part(i, ask=True), self._part(i + 1)
        begin, end = self._prefix(before), self._prefix(after)
        if begin is not None and end is not None:
            return begin, end
        place = _place(self._text, self._marked(self._conversation, i))
        if place is None or not self._text[place:].lstrip().startswith(self._conversation.turns[i]["content"].strip()):
            return None
        begin = self._opening(i, place) if begin is None or begin > place else begin
        end = self._closing(i, place, after) if end is None else end
        return (begin, end) if begin < end else None

    def _part(self, count: int, ask: bool = False) -> str | None:
        """Text of the first turns alone."""
        return attempt(self._directory, self._first(count), ask=ask)

    def _first(self, count: int) -> Conversation:
        return dataclasses.replace(self._conversation, turns=self._conversation.turns[:count])

    def _prefix(self, part: str | None) -> int | None:
        return len(part) if part is not None and self._text.startswith(part) else None

    def _marked(self, conversation: Conversation, i: int) -> str | None:
        return attempt(self._directory, changed(conversation, i, content=MARK))

    def _opening(self, i: int, place: int) -> int:
        """End of what opens an assistant's turn, between the content of the turn before and the answer's."""
        least, opening = 0, self._opening_text
        if i > 0:
            marked = self._marked(self._conversation, i - 1) or ""
            least = len(self._text) - len(os.path.commonprefix([self._text[::-1], marked[::-1]]))
        found = self._text.rfind(opening, least, place) if opening else -1
        return place if found < 0 else found + len(opening)

    @functools.cached_property
    def _opening_text(self) -> str:
        """Render what the template adds where it asks for an answer."""
        turns = self._conversation.turns
        for count in range(len(turns), 0, -1):
            if turns[count - 1]["role"] != "assistant":
                asked, said = self._part(count, ask=True), self._part(count)
                if asked is not None and said is not None and asked.startswith(said):
                    return asked[len(said) :]
        return ""

    def _closing(self, i: int, place: int, after: str | None) -> int:
        """End of the answer: as it is where the conversation ends with it, or else of its content."""
        if after is not None:
            begin = _place(after, self._marked(self._first(i + 1), i))
            if begin is not None and self._text.startswith(after[begin:], place):
                return place + len(after) - begin
        content = self._conversation.turns[i]["content"].strip()
        return self._text.index(content, place) + len(content)


def _place(text: str, marked: str | None) -> int | None:
    """Position at which a text begins to differ from the one with a mark; None if there is no mark in that place."""
    if marked is None:
        return None
    place = len(os.path.commonprefix([text, marked]))
    return place if marked.startswith(MARK, place) else None
