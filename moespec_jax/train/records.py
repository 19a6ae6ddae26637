"""Training data: JSON lines of texts, chats or token ids, read as token ids with a mask of the tokens that count: those
that the head learns to predict.

{"text": "..."}                                       every token counts
{"messages": [{"role": "user", "content": "..."}]}    the assistant's turns count (or `conversations`)
{"prompt_ids": [5, 17], "response_ids": [9, 2]}       the response counts; the format that `regenerate` writes
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moespec_jax.checkpoint.tokenizer import render_chat
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.request import known_ids

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class Sample(NamedTuple):
    """A document or conversation.

    Fields:
        ids: token ids, int32.
        counts: mask of the tokens that count.
    """

    ids: np.ndarray
    counts: np.ndarray


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read line number and object of every line that is not empty.

    Raises:
        RequestError: the file cannot be read, or a line is not a JSON object.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"it holds a {type(record).__name__}")
                    yield number, record
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"expected a file of JSON lines at {path}; {reason}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected JSON objects, one a line, in {path}; line {number}: {error}") from None


def read_samples(model: Model, path: Path) -> Iterator[Sample]:
    """Read a file of JSON lines, and tokenize it for a model.

    Raises:
        RequestError: a line is none of the three kinds, or holds ids outside the model's vocabulary.
        CheckpointError: the chat template rewrites all of an assistant's turns in a chat.
    """
    for number, record in read_records(path):
        where = f"line {number} of {path}"
        if "response_ids" in record:
            yield _ids_sample(model, record, where)
        elif isinstance(record.get("text"), str):
            ids = np.array(model.encode(record["text"]), np.int32)
            yield Sample(ids, np.ones(len(ids), bool))
        else:
            yield _chat_sample(model, chat_turns(record, where), where)


def chat_turns(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Read the turns of a conversation (`messages` or `conversations`) as `role` and `content`.

    Raises:
        RequestError: there are none, or a turn lacks a role or a text.
    """
    given = record.get("messages", record.get("conversations"))
    turns = []
    for turn in given if isinstance(given, list) else []:
        turn = turn if isinstance(turn, dict) else {}
        role, content = _ROLES.get(str(turn.get("role", turn.get("from")))), turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            raise RequestError(f"expected turns with a role (user, assistant, system) and a text in {where}")
        turns.append({"role": role, "content": content})
    if not turns:
        raise RequestError(f"expected 'text', 'messages' or 'response_ids' in {where}; it has {sorted(record)[:5]}")
    return turns


def _ids_sample(model: Model, record: dict[str, Any], where: str) -> Sample:
    prompt, response = record.get("prompt_ids", []), record["response_ids"]
    ids = [*prompt, *response] if isinstance(prompt, list) and isinstance(response, list) else [None]
    if not all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids):
        raise RequestError(f"expected lists of token ids from 0 to {model.config.vocab_size - 1} in {where}")
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt))


def _chat_sample(model: Model, turns: list[dict[str, str]], where: str) -> Sample:
    """Render and tokenize a conversation; tokens that begin inside an assistant's turn count."""
    if model.tokenizer is None:
        raise RequestError(f"expected token ids in {where}: {model.directory} has no tokenizer")
    whole = render_chat(model.directory, turns)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = render_chat(model.directory, turns[:i], ask=True)
            after = render_chat(model.directory, turns[: i + 1])
            # Some templates rewrite earlier turns (they remove the thinking): such a turn does not count.
            if whole.startswith(before) and whole.startswith(after):
                spans.append((len(before), len(after)))
    if not spans:
        raise CheckpointError(f"expected an assistant's turn that the chat template leaves in place in {where}")
    encoding = model.tokenizer.encode(whole, add_special_tokens=False)
    begins = np.array([begin for begin, _ in encoding.offsets])
    counts = np.zeros(len(begins), bool)
    for begin, end in spans:
        counts |= (begins >= begin) & (begins < end)
    return Sample(np.array(known_ids(model.config, model.tokenizer, encoding), np.int32), counts)
