"""Training data: JSON lines of texts, chats or token ids, read as token ids with a mask of the tokens that count: those
that the head learns to predict.

{"text": "..."}                                       every token counts
{"messages": [{"role": "user", "content": "..."}]}    the assistant's turns count (or ShareGPT's `conversations`)
{"prompt_ids": [5, 17], "response_ids": [9, 2]}       the response counts; the format that `regenerate` writes
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moespec_jax.checkpoint.chat import render
from moespec_jax.checkpoint.conversation import Conversation, has_conversation, read_conversation
from moespec_jax.errors import RequestError, UnusableConversation
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.request import known_ids
from moespec_jax.train.spans import answer_spans

# What is done with a conversation that cannot be used: it is left out where this returns.
LeaveOut = Callable[[UnusableConversation], None]


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


def stop(error: UnusableConversation) -> None:
    """Raise the error of a conversation."""
    raise error


def read_samples(
    model: Model, path: Path, *, last_answer_only: bool = False, leave_out: LeaveOut = stop
) -> Iterator[Sample]:
    """Read a file of JSON lines, and tokenize it for a model.

    Args:
        model: tokenizer and chat template.
        path: JSON lines.
        last_answer_only: of a chat, only the assistant's last turn counts.
        leave_out: called with the error of each conversation that the chat template refuses or that has no answer.

    Raises:
        RequestError: a line is none of the three kinds, or holds ids outside the model's vocabulary.
        UnusableConversation: a conversation is left out, by default.
        CheckpointError: there is no chat template.
    """
    for number, record in read_records(path):
        where = f"line {number} of {path}"
        if "response_ids" in record:
            yield _ids_sample(model, record, where)
        elif (text := record_text(record, where)) is not None:
            ids = np.array(model.encode(text), np.int32)
            yield Sample(ids, np.ones(len(ids), bool))
        else:
            conversation = record_conversation(record, where)
            try:
                sample = _chat_sample(model, conversation, last_answer_only)
            except UnusableConversation as error:
                leave_out(error)
            else:
                yield sample


def record_text(record: dict[str, Any], where: str) -> str | None:
    """Read the text of a record; None where it has none.

    Raises:
        RequestError: there is a conversation too, of which other tokens would count.
    """
    text = record.get("text")
    if isinstance(text, str) and has_conversation(record):
        raise RequestError(f"expected one of a text and a conversation in {where}; it has both")
    return text if isinstance(text, str) else None


def record_conversation(record: dict[str, Any], where: str) -> Conversation:
    """Read the conversation of a record.

    Raises:
        RequestError: there is none, or a turn that no chat template can be given.
    """
    conversation = read_conversation(record, where)
    if conversation is None:
        raise RequestError(f"expected 'text', 'messages' or 'response_ids' in {where}; it has {sorted(record)[:5]}")
    return conversation


def _ids_sample(model: Model, record: dict[str, Any], where: str) -> Sample:
    prompt, response = record.get("prompt_ids", []), record["response_ids"]
    ids = [*prompt, *response] if isinstance(prompt, list) and isinstance(response, list) else [None]
    if not all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids):
        raise RequestError(f"expected lists of token ids from 0 to {model.config.vocab_size - 1} in {where}")
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt))


def _chat_sample(model: Model, conversation: Conversation, last_only: bool) -> Sample:
    """Render and tokenize a conversation; tokens that begin inside an assistant's turn count."""
    where = conversation.where
    if model.tokenizer is None:
        raise RequestError(f"expected token ids in {where}: {model.directory} has no tokenizer")
    answers = conversation.answers(last_only)
    if not answers:
        raise UnusableConversation(f"expected an assistant's turn that counts in {where}; it has none")
    rendered = render(model.directory, conversation)
    spans = answer_spans(model.directory, rendered, answers)
    if not spans:
        raise UnusableConversation(f"expected an assistant's turn that the chat template leaves in place in {where}")
    encoding = model.tokenizer.encode(rendered.text, add_special_tokens=False)
    begins = np.array([begin for begin, _ in encoding.offsets])
    counts = np.zeros(len(begins), bool)
    for begin, end in spans:
        counts |= (begins >= begin) & (begins < end)
    return Sample(np.array(known_ids(model.config, model.tokenizer, encoding), np.int32), counts)
