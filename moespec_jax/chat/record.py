"""File of a conversation: its messages as JSON, written whole after every change, so that no text is lost."""

import datetime
import os
from pathlib import Path
from typing import Any

from moespec_jax.checkpoint.conversation import Conversation, read_conversation
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.files import cache_directory, read_json, write_json

Message = dict[str, Any]


def new_file() -> Path:
    """Name a file for a new conversation, by the time, in the user's cache."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    return cache_directory() / "chats" / f"{stamp}-{os.getpid()}.json"


class Record:
    """Messages of a conversation, and their file.

    Fields:
        path: the file.
        messages: as the chat template takes them.
        tools: definitions of tools, if there are any; written with the messages.

    Raises:
        RequestError: the file cannot be read or written, holds no conversation, or has other tools or another system
            text.
    """

    def __init__(self, path: Path, system: str | None = None, tools: list[dict[str, Any]] | None = None) -> None:
        self.path, self.messages, self.tools = path, list[Message](), tools
        if path.exists():
            found = _read(path)
            self.messages, self.tools = found.turns, (found if tools is None else found.with_tools(tools)).tools
        if system and self.messages and self.messages[0]["role"] in ("system", "developer"):
            raise RequestError(f"expected one system text in {path}; it has a system turn beside --system")
        if system:
            self.messages.insert(0, {"role": "system", "content": system})

    def say(self, role: str, text: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": text})
        self._write()

    def replace_last(self, text: str) -> None:
        """Replace the text of the last message, while it is written."""
        self.messages[-1]["content"] = text
        self._write()

    def cut(self, count: int) -> None:
        """Keep the first `count` messages."""
        del self.messages[count:]
        self._write()

    def clear(self) -> None:
        """Remove all messages but the system's."""
        self.messages = [message for message in self.messages if message["role"] in ("system", "developer")]
        self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"messages": self.messages} | ({"tools": self.tools} if self.tools else {}))
        except OSError as error:
            raise RequestError(f"expected to write the conversation to {self.path}; {error.strerror}") from None


def _read(path: Path) -> Conversation:
    try:
        conversation = read_conversation(read_json(path), str(path))
    except CheckpointError as error:
        raise RequestError(str(error)) from None
    if conversation is None:
        raise RequestError(f"expected a JSON object with 'messages' in {path}; it has none")
    return conversation
