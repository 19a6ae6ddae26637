"""Conversations in the forms that people have, read as the messages that a checkpoint's chat template renders.

{"messages": [{"role": "user", "content": "..."}]}         OpenAI's form
{"conversations": [{"from": "human", "value": "..."}]}     ShareGPT's form

Every field of a turn reaches the chat template. `tools` (or `functions`) and `system` of the conversation do too; its
other fields are taken as metadata.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.errors import RequestError

Turn = dict[str, Any]
_FORMS = ("messages", "conversations")

# Roles of the data, and those that chat templates know. A call is the assistant's, with the call as JSON in its text.
_CALLS = ("function_call", "tool_call")
ROLES = {role: role for role in ("user", "assistant", "system", "developer", "tool")}
ROLES |= dict.fromkeys(("human",), "user")
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", *_CALLS), "assistant")
ROLES |= dict.fromkeys(("function", "observation", "tool_response"), "tool")
# Names of the same text, of which templates know one or the other.
_REASONING = ("reasoning_content", "reasoning")
# Flags of a turn that decide whether it is learned.
_LEARNED = ("weight", "train", "loss")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Fields:
        where: line and file, for errors.
        turns: messages, each with `role`, `content` (a text) and the other fields of the data.
        tools: definitions of tools, if there are any.
    """

    where: str
    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None

    def answers(self, last_only: bool = False) -> list[int]:
        """List the assistant's turns that are learned: all whose `weight`, `train` or `loss` is not 0; or the last."""
        found = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        return [i for i in found[-1 if last_only else 0 :] if all(turn_flag(self.turns[i], n) for n in _LEARNED)]

    def with_system(self, text: str) -> "Conversation":
        """Add a system turn.

        Raises:
            RequestError: there is one.
        """
        if self.turns[0]["role"] in ("system", "developer"):
            raise RequestError(f"expected one system text in {self.where}; it has a system turn beside {shown(text)}")
        return dataclasses.replace(self, turns=[{"role": "system", "content": text}, *self.turns])

    def with_tools(self, tools: list[dict[str, Any]]) -> "Conversation":
        """Add tools.

        Raises:
            RequestError: there are others.
        """
        if self.tools and self.tools != tools:
            raise RequestError(f"expected one list of tools in {self.where}; it has its own beside --tools")
        return dataclasses.replace(self, tools=tools)


def turn_flag(turn: Turn, name: str) -> bool:
    """Test whether a flag of a turn is set, or absent."""
    return bool(turn.get(name, True))


def has_conversation(record: dict[str, Any]) -> bool:
    """Test whether a record holds a conversation, in either form."""
    return any(record.get(name) for name in _FORMS)


def read_conversation(record: dict[str, Any], where: str) -> Conversation | None:
    """Read the conversation of a record, in either form; None where it has none.

    Raises:
        RequestError: a turn has no role or no text, or something that no chat template can be given.
    """
    found = [record[name] for name in _FORMS if record.get(name)]
    if len(found) > 1 and found[0] != found[1]:
        raise RequestError(f"expected one of 'messages' and 'conversations' in {where}; it has both")
    if not found or not isinstance(found[0], list):
        return None
    for name in _MEDIA:
        if record.get(name):
            raise RequestError(f"expected a conversation of texts in {where}; it has {name!r}")
    turns = [_read_turn(turn, f"turn {number} of {where}") for number, turn in enumerate(found[0], 1)]
    conversation = Conversation(where, turns, read_tools(record, where))
    for name in ("system", "system_prompt"):
        if text := record.get(name):
            if not isinstance(text, str):
                raise RequestError(f"expected {name!r} to be a text in {where}; it is {shown(text)}")
            if turns[0] != {"role": "system", "content": text}:  # some data hold it twice
                conversation = conversation.with_system(text)
    return conversation


def _read_turn(given: object, where: str) -> Turn:
    if not isinstance(given, dict):
        raise RequestError(f"expected turns with a role and a text; {where} is {shown(given)}")
    turn = {name: value for name, value in given.items() if value is not None}
    said = _either(turn, "role", "from", where)
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RequestError(f"expected turns with a role of {', '.join(ROLES)}; {where} has {shown(said)}")
    content = _text(_either(turn, "content", "value", where), where)
    if said in _CALLS:
        turn["tool_calls"], content = [_object(call, said, where) for call in _calls(content, said, where)], ""
    turn = _with_calls({name: v for name, v in turn.items() if name not in ("from", "value")}, where)
    for name, other in (_REASONING, _REASONING[::-1]):
        if name in turn:
            turn.setdefault(other, turn[name])
    if content is None and not any(turn.get(name) for name in ("tool_calls", *_REASONING)):
        raise RequestError(f"expected turns with a role and a text; {where} has no text and calls no tool")
    for name in _LEARNED:
        if turn.get(name, 1) not in (0, 1):
            raise RequestError(f"expected {name!r} to be 0 or 1; {where} has {shown(turn[name])}")
    return turn | {"role": role, "content": content or ""}


def _either(turn: Turn, one: str, other: str, where: str) -> Any:
    """Value of a field that has two names."""
    if one in turn and other in turn and turn[one] != turn[other]:
        raise RequestError(f"expected one of {one!r} and {other!r}; {where} has both")
    return turn.get(one, turn.get(other))


def _text(content: object, where: str) -> str | None:
    """Join the text parts of a content; None where there is no content."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"expected turns with a role and a text; {where} has {shown(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"expected parts of type 'text', with a text; {where} has a part of type {shown(kind)}")
    return "".join(part["text"] for part in content) if content else None


def _with_calls(turn: Turn, where: str) -> Turn:
    """Give a turn's calls the form of `tool_calls`; a single `function_call` is its older form."""
    calls, single = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if isinstance(calls, str):
        calls = _parsed(calls, "tool_calls", where)
    if not calls and single:
        calls = [_object(single, "function_call", where)]
    if not calls:
        return turn
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"expected calls of tools with a name; {where} has {shown(call)}")
    return turn | {"tool_calls": calls if isinstance(calls, list) else [calls]}


def _calls(content: str | None, name: str, where: str) -> list[Any]:
    found = _parsed(content or "", name, where)
    return found if isinstance(found, list) else [found]


def _object(function: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise RequestError(f"expected {name!r} to be a JSON object; {where} has {shown(function)}")
    return function if "function" in function else {"type": "function", "function": function}


def read_tools(record: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Read the definitions of tools of a record, `tools` or `functions`; None where it has none.

    Raises:
        RequestError: they are no list of JSON objects.
    """
    name = "tools" if record.get("tools") else "functions"
    tools = record.get(name)
    if isinstance(tools, str):
        tools = _parsed(tools, name, where) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RequestError(f"expected {name!r} to be a list in {where}; it is {shown(tools)}")
    return [_object(tool, name, where) for tool in tools]


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"expected {name!r} to be JSON; {where} has {shown(text)}") from None


def text_arguments(turns: Sequence[Turn]) -> dict[str, Any]:
    """Collect the arguments of calls that are JSON objects written as texts, with their values."""
    found = {}
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
                try:
                    found[arguments] = json.loads(arguments)
                except (ValueError, RecursionError):
                    continue
    return found


def with_arguments(conversation: Conversation, values: dict[str, Any]) -> Conversation:
    """Replace texts of arguments by their values."""

    def replaced(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": replaced(call["function"])}
        arguments = call.get("arguments")
        return call | {"arguments": values[arguments]} if isinstance(arguments, str) and arguments in values else call

    turns = [
        t | {"tool_calls": [replaced(c) for c in t["tool_calls"]]} if "tool_calls" in t else t
        for t in conversation.turns
    ]
    return dataclasses.replace(conversation, turns=turns)
