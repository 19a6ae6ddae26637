"""The checkpoint's tokenizer, chat template and stop tokens, and incremental decoding of text."""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moespec_jax.checkpoint.added_tokens import add_stated_tokens
from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.checkpoint.wrappers import text_fields
from moespec_jax.errors import CheckpointError, UnusableConversation, first_line
from moespec_jax.files import read_json

_NO_MERGES = re.compile(r'"merges"\s*:\s*\[\s*\]')
_LARGEST_ID = 2**31 - 1  # ids are int32 on the device


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint directory; None where it has none.

    `tokenizer.json` is read by the tokenizers library, with the tokens that other files add to it. Older formats are
    converted by transformers.

    Raises:
        CheckpointError: there is a tokenizer file and it cannot be read, or another file contradicts it.
    """
    file = directory / "tokenizer.json"
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except BaseException as error:  # the tokenizers library raises Exception, and BaseException where it panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise CheckpointError(f"expected a tokenizer in {file}; {error}") from None
        _check_merges(file)
        add_stated_tokens(tokenizer, directory)
        # Some files hold settings of truncation and padding, which must not apply to prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if not any((directory / name).exists() for name in ("tokenizer.model", "vocab.json")):
        return None
    try:
        return _transformers_tokenizer(directory)._tokenizer
    except Exception as error:  # of any type: transformers and sentencepiece document none
        raise CheckpointError(f"expected a tokenizer in {directory}; {first_line(error)}") from None


def decode_after(tokenizer: Tokenizer, token_ids: Sequence[int], after: Sequence[int]) -> str:
    """Decode token ids that follow others, without special tokens."""
    before = tokenizer.decode(list(after), skip_special_tokens=True)
    whole = tokenizer.decode([*after, *token_ids], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


def _check_merges(file: Path) -> None:
    """Refuse a tokenizer.json without the merges that stand beside it: it would split text into single bytes."""
    merges = file.with_name("merges.txt")
    if merges.exists() and _NO_MERGES.search(file.read_text(encoding="utf-8", errors="replace")):
        lines = merges.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(line.strip() and not line.startswith("#") for line in lines):
            raise CheckpointError(f"expected the merges of {merges} in {file}; it has none")


def render_chat(
    directory: Path,
    turns: list[dict[str, Any]],
    *,
    ask: bool = False,
    thinking: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Format turns in the checkpoint's chat template; with `ask`, followed by the start of the assistant's next turn.

    Raises:
        UnusableConversation: the template refuses the turns.
        CheckpointError: the checkpoint has no chat template.
    """
    try:
        tokenizer = _transformers_tokenizer(directory)
        if tokenizer.chat_template is None:
            raise ValueError("the checkpoint has no chat template")
    except Exception as error:  # of any type: transformers documents none
        raise CheckpointError(f"expected a chat template in {directory}; {first_line(error)}") from None
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=ask, enable_thinking=thinking, tools=tools
        )
    except Exception as error:  # templates are programs of the checkpoint and may raise anything
        raise UnusableConversation(
            f"expected a chat template in {directory} that renders the conversation; {first_line(error)}"
        ) from None


def read_stop_ids(directory: Path) -> tuple[int, ...]:
    """Read the token ids that end a sequence: `eos_token_id` of `generation_config.json`, else of `config.json`.

    Raises:
        CheckpointError: the field is not an id, a list of ids or null.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.exists():
            continue
        given = text_fields(read_json(file)).get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(type(i) is int and 0 <= i <= _LARGEST_ID for i in ids):
            raise CheckpointError(f"expected eos_token_id to be an id or a list of ids in {file}; it is {shown(given)}")
        if ids:
            return tuple(ids)
    return ()


class TextStream:
    """Incremental decoding of one sequence: a character that consists of several tokens is returned with its last one.

    Push the prompt first: some tokenizers drop the leading space of the first text that they decode.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Ids of the text returned last, as context, and of the pending text.
        self._ids: list[int] = []
        self._returned = 0  # number of them whose text has been returned

    def push(self, ids: Iterable[int]) -> str:
        """Append ids; return the text that they complete."""
        return "".join(self._step(i) for i in ids)

    def flush(self) -> str:
        """Return the remaining text at the end; bytes of an incomplete character are decoded as U+FFFD."""
        rest = self._pending()
        self._returned = len(self._ids)
        return rest

    def _step(self, i: int) -> str:
        self._ids.append(i)
        text = self._pending()
        # Empty text (of a special token) would be no context for the next one; a final U+FFFD may be incomplete.
        if not text or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._returned]
        self._returned = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._returned], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(before) :]


@functools.lru_cache(maxsize=4)
def _transformers_tokenizer(directory: Path) -> Any:
    import os

    # transformers prints an advice to install torch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
