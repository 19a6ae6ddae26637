"""Prompts of a command: text, files, standard input or token ids."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from moespec_jax.errors import RequestError
from moespec_jax.files import expanded

# It ends inside a line, since tokenizers of code merge the end of a line with the indentation of the next one.
DEFAULT_PROMPT = '''import os
import sys


def read_lines(path):
    """Return the lines of a file without their line ends."""
    with open(path'''


def gather_texts(arguments: argparse.Namespace, read_stdin: Callable[[], str]) -> list[str]:
    """Read all text prompts, those of `--prompt` (`-` is standard input) before those of files; else a built-in one.

    Raises:
        RequestError: a file or standard input cannot be read, or a file holds no prompt.
    """
    texts = [_decoded(read_stdin) if text == "-" else text for text in arguments.prompt or []]
    for file in arguments.prompt_file or []:
        texts += read_prompt_file(expanded(file))
    if not texts and not arguments.prompt_ids:
        texts = [DEFAULT_PROMPT]
    return texts


def read_prompt_file(path: Path) -> list[str]:
    """Read the prompts of a file: the first of the `turns` of each line of .json and .jsonl, each line of other files.

    Raises:
        RequestError: the file is missing, not UTF-8 or empty, or a JSON line has no turn.
    """
    try:
        # splitlines() would also split at characters that may be part of a prompt or a JSON string.
        numbered = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"expected a file of prompts at {path}; {reason}") from None
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise RequestError(f"expected a file of prompts at {path}; it is empty")
    if path.suffix in (".jsonl", ".json"):
        return [_first_turn(line, number, path) for number, line in lines]
    return [line for _, line in lines]


def parse_prompt_ids(text: str) -> list[int]:
    """Parse token ids such as `5,17,9`.

    Raises:
        RequestError: something between the commas is not an integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"expected --prompt-ids like 5,17,9; got {text!r}") from None


def _decoded(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError:
        raise RequestError("expected a prompt of UTF-8 text on standard input; it is not UTF-8") from None


def _first_turn(line: str, number: int, path: Path) -> str:
    try:
        turns = json.loads(line)["turns"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise RequestError(f"expected a JSON object with a list of texts 'turns' in line {number} of {path}")
    return turns[0]
