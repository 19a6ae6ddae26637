"""Prompts of a command: text, files, standard input or token ids."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moespec_jax.checkpoint.chat import render
from moespec_jax.checkpoint.conversation import Conversation, read_conversation, read_tools
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded
from moespec_jax.runtime.model import Model

# It ends inside a line, since tokenizers of code merge the end of a line with the indentation of the next one.
DEFAULT_PROMPT = '''import os
import sys


def read_lines(path):
    """Return the lines of a file without their line ends."""
    with open(path'''
TOOLS_WITHOUT_CONVERSATION = "--tools are parts of a conversation; expected --chat with them, or prompts of messages"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer.

    Fields:
        text: the text; of a conversation, the user's first text or last message.
        conversation: what is answered first, without the later texts; None for a text.
        later: further texts of the user, each of which follows the answer to the one before.
    """

    text: str
    conversation: Conversation | None = None
    later: tuple[str, ...] = ()

    def first(self) -> "Prompt":
        """Prompt without the later texts; the first of several is a text, as a single one is."""
        return Prompt(self.text) if self.later else self


def gather_prompts(arguments: argparse.Namespace, read_stdin: Callable[[], str]) -> list[Prompt]:
    """Read the texts of `--prompt` (`-` is standard input), `--prompt-text` and `--prompt-file`; else a built-in one.

    Raises:
        RequestError: a file or standard input cannot be read, or a file holds no prompt.
    """
    prompts = [Prompt(_decoded(read_stdin) if text == "-" else text) for text in arguments.prompt or []]
    prompts += [Prompt(_read_text(expanded(file), "a prompt")) for file in arguments.prompt_text or []]
    for file in arguments.prompt_file or []:
        prompts += read_prompts(expanded(file))
    if not prompts and not arguments.prompt_ids:
        prompts = [Prompt(DEFAULT_PROMPT)]
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file: `turns` or `messages` of each line of .json and .jsonl, each line of other files.

    `turns` are texts of the user: each follows the answer to the one before. A single one is a text, and not a
    conversation. `messages` (or `conversations`) are one, and end before the answer.

    Raises:
        RequestError: the file is missing, not UTF-8 or empty, or a JSON line has neither.
    """
    # splitlines() would also split at characters that may be part of a prompt or a JSON string.
    numbered = enumerate(_read_text(path, "a file of prompts").split("\n"), 1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if path.suffix in (".jsonl", ".json"):
        return [_json_prompt(line, f"line {number} of {path}") for number, line in lines]
    return [Prompt(line) for _, line in lines]


def read_prompt_file(path: Path) -> list[str]:
    """Read the texts of a file: the first of the `turns` of each line of .json and .jsonl, each line of other files.

    Raises:
        RequestError: as `read_prompts`, or a line has `messages`.
    """
    prompts = read_prompts(path)
    for prompt in prompts:
        if prompt.conversation is not None and not prompt.later:
            raise RequestError(f"expected a text in {prompt.conversation.where}; it has messages")
    return [prompt.text for prompt in prompts]


def read_turns(row: dict[str, Any], where: str) -> Prompt:
    """Read `turns` or `messages` of a JSON object.

    Raises:
        RequestError: it has neither, or both, or messages that end with the assistant's.
    """
    conversation = read_conversation(row, where)
    turns = row.get("turns")
    if conversation is not None and turns is None:
        last = conversation.turns[-1]
        if last["role"] == "assistant":
            raise RequestError(f"expected messages that end before the answer in {where}; the last is the assistant's")
        return Prompt(last["content"], conversation)
    if not isinstance(turns, list) or not turns or not all(isinstance(text, str) for text in turns):
        raise RequestError(f"expected a JSON object with a list of texts 'turns' in {where}, or 'messages'")
    if conversation is not None:
        raise RequestError(f"expected one of 'turns' and 'messages' in {where}; it has both")
    if len(turns) == 1:
        return Prompt(turns[0])
    return Prompt(turns[0], Conversation(where, [{"role": "user", "content": turns[0]}]), tuple(turns[1:]))


def read_tools_file(path: Path) -> list[dict[str, Any]]:
    """Read definitions of tools: a JSON list, or an object with `tools` or `functions`.

    Raises:
        RequestError: the file cannot be read, or holds none.
    """
    text = _read_text(path, "JSON with tools")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    record = {"tools": value} if isinstance(value, list) else value if isinstance(value, dict) else {}
    if (tools := read_tools(record, str(path))) is None:
        raise RequestError(f"expected JSON with tools at {path}: a list of definitions, or an object with 'tools'")
    return tools


def encode_prompt(
    model: Model,
    prompt: Prompt,
    *,
    chat: bool,
    system: str | None = None,
    thinking: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Tokenize a prompt, as `chat_text` renders it."""
    text = chat_text(model, prompt, chat=chat, system=system, thinking=thinking, tools=tools)
    # A chat template contains the special tokens.
    return model.encode(prompt.text) if text is None else model.encode(text, special_tokens=False)


def chat_text(
    model: Model,
    prompt: Prompt,
    *,
    chat: bool,
    system: str | None = None,
    thinking: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str | None:
    """Render a conversation by the chat template, and with `chat` a text too; None for other texts.

    Raises:
        CheckpointError: there is no chat template, or it refuses the conversation.
        RequestError: `system` would be the second system turn, `tools` a second list, or there is no conversation.
    """
    conversation = prompt.conversation
    if conversation is None and chat:
        conversation = Conversation("the prompt", [{"role": "user", "content": prompt.text}])
    if conversation is None:
        if tools:
            raise RequestError(TOOLS_WITHOUT_CONVERSATION)
        return None
    if system:
        conversation = conversation.with_system(system)
    if tools:
        conversation = conversation.with_tools(tools)
    return render(model.directory, conversation, ask=True, thinking=thinking).text


def parse_prompt_ids(text: str) -> list[int]:
    """Parse token ids such as `5,17,9`.

    Raises:
        RequestError: something between the commas is not an integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"expected --prompt-ids like 5,17,9; got {text!r}") from None


def _read_text(path: Path, expected: str) -> str:
    """Read a text that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"expected {expected} at {path}; {reason}") from None
    if not text.strip():
        raise RequestError(f"expected {expected} at {path}; it is empty")
    return text


def _decoded(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError:
        raise RequestError("expected a prompt of UTF-8 text on standard input; it is not UTF-8") from None


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return read_turns(row if isinstance(row, dict) else {}, where)
