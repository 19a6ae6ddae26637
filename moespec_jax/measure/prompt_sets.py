"""Sets of prompts to measure on: files, or excerpts of Python modules that the embedded pair was not trained on."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moespec_jax.cli.prompts import encode_prompt, read_prompts
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded
from moespec_jax.measure import corpus
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.requested_sampling import GREEDY

# Name of the set of excerpts, and their default length in tokens.
HELD_OUT, PIECE = "held-out modules", 64


def add_prompt_set_flags(group: argparse._ArgumentGroup, count: int, longest: int = 256) -> None:
    """Add `--prompts`, `--count` and `--longest-prompt`, with their defaults."""
    group.add_argument(
        "--prompts",
        action="append",
        metavar="NAME=FILE",
        help="set of prompts: a file with one prompt in each line, or JSON lines with turns, of which the first is the"
        " prompt (a later one would need the answer before it), or with messages, which the chat template renders;"
        " held-out: excerpts of standard-library modules that the embedded pair was not trained on (default);"
        " repeatable",
    )
    group.add_argument("--count", type=int, default=count, metavar="N", help=f"prompts of each set (default: {count})")
    group.add_argument(
        "--longest-prompt",
        type=int,
        default=longest,
        metavar="N",
        help=f"keep only the last N tokens of each prompt (default: {longest})",
    )


def check_prompt_sets(arguments: argparse.Namespace) -> None:
    """Check the sets of the flags, before a model is loaded.

    Raises:
        RequestError: a set has no name or its file cannot be read, two have the same name, or a number is out of range.
    """
    if arguments.count < 1 or arguments.longest_prompt < 1:
        raise RequestError(
            f"expected --count and --longest-prompt of at least 1; got {arguments.count}, {arguments.longest_prompt}"
        )
    names = [name for name, _ in _named(arguments)]
    if len(set(names)) < len(names):
        raise RequestError(f"expected sets of prompts of different names; got {', '.join(names)}")
    for _, file in _named(arguments):
        if file is not None:
            read_prompts(file)


def prompt_sets(model: Model, arguments: argparse.Namespace, piece: int = PIECE) -> dict[str, list[list[int]]]:
    """Read the prompts of every set of the flags as token ids, cut to their last `longest_prompt` tokens.

    Args:
        model: its tokenizer encodes the prompts.
        arguments: with the flags of `add_prompt_set_flags`, `chat` and maybe `no_thinking`; a chat template does not
            apply to held-out modules.
        piece: largest length of an excerpt of held-out modules, in tokens.

    Raises:
        RequestError: a file cannot be read, or holds an empty prompt.
    """
    sets = {}
    for name, file in _named(arguments):
        if file is None:
            sets[name] = held_out_pieces(model, arguments.count, min(piece, arguments.longest_prompt))
            continue
        thinking = not getattr(arguments, "no_thinking", False)
        prompts = [prompt.first() for prompt in read_prompts(file)[: arguments.count]]
        encoded = [encode_prompt(model, prompt, chat=arguments.chat, thinking=thinking) for prompt in prompts]
        sets[name] = [ids[-arguments.longest_prompt :] for ids in encoded]
    return sets


def held_out_pieces(model: Model, count: int, length: int = PIECE) -> list[list[int]]:
    """Cut `count` evenly spaced excerpts of `length` tokens each from the held-out modules.

    Raises:
        RequestError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise RequestError(f"expected a tokenizer in {model.directory} to measure on text with; it has none")
    documents = corpus.held_out_documents()
    if model.tokenizer.token_to_id(corpus.END_OF_TEXT) is not None:
        stream = corpus.encode_documents(model.tokenizer, documents)
    else:
        stream = np.concatenate([np.array(e.ids, np.int32) for e in model.tokenizer.encode_batch(documents)])
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int)
    return [stream[start : start + length].tolist() for start in starts]


def continued(model: Model, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Append to each prompt the model's own greedy continuation of `tokens` tokens, by plain decoding."""
    result = model.generate(prompts, tree=None, max_new_tokens=tokens, ignore_eos=True, **GREEDY)
    return [[*prompt, *r.token_ids] for prompt, r in zip(prompts, result.prompts, strict=True)]


def _named(arguments: argparse.Namespace) -> list[tuple[str, Path | None]]:
    """Parse the sets of the flags into names and files; the file of held-out modules is None."""
    sets: list[tuple[str, Path | None]] = []
    for text in arguments.prompts or ["held-out"]:
        name, equals, file = text.partition("=")
        if text == "held-out":
            sets.append((HELD_OUT, None))
        elif equals and name and file:
            sets.append((name, expanded(file)))
        else:
            raise RequestError(f"expected --prompts as NAME=FILE or held-out; got {text!r}")
    return sets
