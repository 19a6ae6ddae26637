"""Sets of prompts and texts to measure on: files of them, or pieces of Python that no model here was trained on."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moespec_jax.cli.prompts import read_prompt_file
from moespec_jax.errors import RequestError
from moespec_jax.measure import corpus
from moespec_jax.runtime.model import Model

HELD_OUT, PIECE = "held-out modules", 64


def add_prompt_set_flags(group: argparse._ArgumentGroup, count: int, longest: int = 256) -> None:
    """`--prompts`, `--count` and `--longest-prompt`, with their defaults."""
    group.add_argument(
        "--prompts",
        action="append",
        metavar="NAME=FILE",
        help="a set of prompts, one a line or JSON lines with turns; repeatable; held-out is pieces of the standard"
        " library's modules that the embedded pair was not trained on (default)",
    )
    group.add_argument("--count", type=int, default=count, help=f"prompts of each set ({count})")
    group.add_argument(
        "--longest-prompt",
        type=int,
        default=longest,
        metavar="N",
        help=f"prompts are cut to their last N tokens ({longest})",
    )


def check_prompt_sets(arguments: argparse.Namespace) -> None:
    """Refuse sets that cannot be, before a model is loaded.

    Raises:
        RequestError: a set has no name or no such file, or a number is out of range.
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
            read_prompt_file(file)


def prompt_sets(
    model: Model, arguments: argparse.Namespace, as_chat: Callable[[str], str] | None = None, piece: int = PIECE
) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of every set that the flags name, cut to their last `longest_prompt` tokens; of held-out
    modules, pieces of `piece` tokens. `as_chat` puts a text into the model's chat template.

    Raises:
        RequestError: a file cannot be read, or holds an empty prompt.
    """
    sets = {}
    for name, file in _named(arguments):
        if file is None:
            sets[name] = held_out_pieces(model, arguments.count, min(piece, arguments.longest_prompt))
            continue
        texts = read_prompt_file(file)[: arguments.count]
        texts = texts if as_chat is None else [as_chat(text) for text in texts]
        sets[name] = [model.encode(t, special_tokens=as_chat is None)[-arguments.longest_prompt :] for t in texts]
    return sets


def held_out_pieces(model: Model, count: int, length: int = PIECE) -> list[list[int]]:
    """`count` evenly spaced pieces of the held-out modules, of `length` tokens each.

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
    """Prompts with what the model itself continues them by, exactly and greedily, `tokens` of them."""
    result = model.generate(prompts, tree=None, max_new_tokens=tokens, ignore_eos=True)
    return [[*prompt, *r.token_ids] for prompt, r in zip(prompts, result.prompts, strict=True)]


def _named(arguments: argparse.Namespace) -> list[tuple[str, Path | None]]:
    """Names of sets and their files; None for held-out modules."""
    sets: list[tuple[str, Path | None]] = []
    for given in arguments.prompts or ["held-out"]:
        name, equals, file = given.partition("=")
        if given == "held-out":
            sets.append((HELD_OUT, None))
        elif equals and name and file:
            sets.append((name, Path(file)))
        else:
            raise RequestError(f"expected --prompts as NAME=FILE or held-out; got {given!r}")
    return sets
