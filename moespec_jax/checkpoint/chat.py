"""A conversation rendered by the checkpoint's chat template, complete or refused by name."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moespec_jax.checkpoint.conversation import Conversation, read_conversation, text_arguments, with_arguments
from moespec_jax.checkpoint.tokenizer import render_chat
from moespec_jax.errors import UnusableConversation

# In place of a text, to see where a template puts it: characters that no text contains.
MARK = "\ue0f0\ue0f1\ue0f2"


class Rendered(NamedTuple):
    """A conversation with its text.

    Fields:
        conversation: in the form that the template was given.
        text: rendered by the template.
    """

    conversation: Conversation
    text: str


def render(directory: Path, conversation: Conversation, *, ask: bool = False, thinking: bool = True) -> Rendered:
    """Render a conversation; with `ask`, followed by the start of the assistant's next turn.

    Arguments of calls that the data hold as texts of JSON are given as they are, and as objects where the template
    would encode a text a second time, or needs an object.

    Raises:
        UnusableConversation: the template refuses the conversation, or leaves out a turn, a call or the tools.
        CheckpointError: the checkpoint has no chat template.
    """
    found = _fitted(directory, conversation, ask, thinking)
    if (missing := _missing(directory, found, ask, thinking)) is not None:
        raise UnusableConversation(
            f"expected a chat template that renders all of {conversation.where}; it leaves out {missing}"
        )
    return found


def render_messages(directory: Path, messages: Iterable[Mapping[str, Any]]) -> str:
    """Render messages of a caller, followed by the start of the assistant's turn.

    Raises:
        RequestError: a message has no role or no text.
        UnusableConversation, CheckpointError: as `render`.
    """
    conversation = read_conversation({"messages": [dict(message) for message in messages]}, "the messages")
    assert conversation is not None
    return render(directory, conversation, ask=True).text


def attempt(directory: Path, conversation: Conversation, *, ask: bool = False, thinking: bool = True) -> str | None:
    """Render a changed conversation; None where the template refuses it."""
    try:
        return _render(directory, conversation, ask, thinking)
    except UnusableConversation:
        return None


def changed(conversation: Conversation, number: int, **fields: object) -> Conversation:
    """Replace fields of a turn; a field of None is removed."""
    turns = list(conversation.turns)
    turns[number] = {name: value for name, value in (turns[number] | fields).items() if value is not None}
    return dataclasses.replace(conversation, turns=turns)


def _fitted(directory: Path, conversation: Conversation, ask: bool, thinking: bool) -> Rendered:
    """Render with the arguments of calls in the form that the template needs."""
    if values := text_arguments(conversation.turns):
        text = attempt(directory, conversation, ask=ask, thinking=thinking)
        twice = [json.dumps(given, ensure_ascii=ascii) for given in values for ascii in (True, False)]
        if text is not None and not any(encoded in text for encoded in twice):
            return Rendered(conversation, text)
        conversation = with_arguments(conversation, values)
    return Rendered(conversation, _render(directory, conversation, ask, thinking))


def _render(directory: Path, conversation: Conversation, ask: bool, thinking: bool) -> str:
    try:
        return render_chat(directory, conversation.turns, ask=ask, thinking=thinking, tools=conversation.tools)
    except UnusableConversation as error:
        raise UnusableConversation(f"{error}, in {conversation.where}") from None


def _missing(directory: Path, found: Rendered, ask: bool, thinking: bool) -> str | None:
    """Name what the text lacks: a template may ignore roles and fields that it does not know."""
    conversation, text = found

    def ignores(other: Conversation) -> bool:
        return attempt(directory, other, ask=ask, thinking=thinking) == text

    for number, turn in enumerate(conversation.turns):
        content, role = turn["content"].strip(), turn["role"]
        stands = role in ("user", "assistant") and content in text
        if content and not stands and ignores(changed(conversation, number, content=MARK)):
            return f"the text of turn {number + 1}, whose role is {role!r}"
        if "tool_calls" in turn and ignores(changed(conversation, number, tool_calls=None)):
            return f"tool_calls of turn {number + 1}"
    if conversation.tools and ignores(dataclasses.replace(conversation, tools=None)):
        return "the tools"
    return None
