"""Text to token ids and back: the checkpoint's own tokenizer, its chat template, and text that arrives bit by bit."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json

_LARGEST_ID = 2**31 - 1  # ids are int32 on the device


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, None where it has none.

    A `tokenizer.json` is read as it is. Older formats are converted by transformers.

    Raises:
        CheckpointError: there is a tokenizer file and it cannot be read.
    """
    file = directory / "tokenizer.json"
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except BaseException as error:  # the tokenizers library raises bare Exception, and more where it panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise CheckpointError(f"expected a tokenizer in {file}; {error}") from None
        # Some files carry how their last user cut or filled texts; a prompt is taken whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if not any((directory / name).exists() for name in ("tokenizer.model", "vocab.json")):
        return None
    try:
        return _transformers_tokenizer(directory)._tokenizer
    except Exception as error:  # whatever transformers or sentencepiece say about somebody's file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"expected a tokenizer in {directory}; {reason}") from None


def chat_prompt(directory: Path, prompt: str, system: str | None, thinking: bool) -> str:
    """One user turn (and a system turn) in the checkpoint's chat template, ready for the answer.

    Raises:
        CheckpointError: the checkpoint has no chat template, or the template refuses the turns.
    """
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    return render_chat(directory, turns, ask=True, thinking=thinking)


def render_chat(directory: Path, turns: list[dict[str, str]], *, ask: bool = False, thinking: bool = True) -> str:
    """Turns in the checkpoint's chat template; with `ask`, ready for the assistant's next one.

    Raises:
        CheckpointError: the checkpoint has no chat template, or the template refuses the turns.
    """
    try:
        tokenizer = _transformers_tokenizer(directory)
        if tokenizer.chat_template is None:
            raise ValueError("the checkpoint has no chat template")
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, enable_thinking=thinking)
    except Exception as error:  # templates are somebody's programs and raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"expected a chat template in {directory}; {reason}") from None


def read_stop_ids(directory: Path) -> tuple[int, ...]:
    """Token ids that end a sequence: `eos_token_id` of `generation_config.json`, else of `config.json`.

    Raises:
        CheckpointError: the field is not an id, a list of ids or null.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.exists():
            continue
        given = read_json(file).get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(type(i) is int and 0 <= i <= _LARGEST_ID for i in ids):
            raise CheckpointError(f"expected eos_token_id to be an id or a list of ids in {file}; it is {shown(given)}")
        if ids:
            return tuple(ids)
    return ()


class TextStream:
    """Text of one sequence as its tokens arrive; a character of several tokens comes out whole or not yet.

    The prompt belongs to the sequence: push it first, for some tokenizers drop a leading space of what they see first.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # from the start of the piece before the pending one
        self._given = 0  # how many of them have been given out as text

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids."""
        return "".join(self._step(i) for i in ids)

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character come out as U+FFFD."""
        rest = self._pending()
        self._given = len(self._ids)
        return rest

    def _step(self, i: int) -> str:
        self._ids.append(i)
        piece = self._pending()
        # Without text of its own (a special token) a piece is no context for the next one; with U+FFFD it may be cut.
        if not piece or piece.endswith("\ufffd"):
            return ""
        del self._ids[: self._given]
        self._given = len(self._ids)
        return piece

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(before) :]


@functools.lru_cache(maxsize=4)
def _transformers_tokenizer(directory: Path) -> Any:
    import os

    # transformers advises people without torch to install it; nobody here needs that advice.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
