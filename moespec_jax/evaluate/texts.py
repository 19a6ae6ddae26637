"""Texts to follow: as people wrote them, or as the exact target itself goes on."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from moespec_jax.cli.prompts import read_prompt_file
from moespec_jax.errors import RequestError
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import HELD_OUT, PIECE, continued, held_out_pieces, prompt_sets
from moespec_jax.runtime.model import Model

WRITTEN, OWN = "as written", "the target's own"


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Texts as token ids: of each, the first `given` tokens are read as a prompt is, and the rest is followed."""

    name: str
    kind: str
    texts: list[list[int]]
    given: list[int]

    def scored_bytes(self, model: Model) -> list[int]:
        """How many bytes of text the tokens are that following tells a probability of: all after the first root."""
        pairs = zip(self.texts, self.given, strict=True)
        said = (model.decode(text[given + 1 :], after=text[: given + 1]) for text, given in pairs)
        return [len((text or "").encode()) for text in said]


def add_text_flags(group: argparse._ArgumentGroup, tokens: int) -> None:
    """`--texts` and `--tokens`."""
    group.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"texts to follow as they are, after {PIECE} tokens (or half) of each: one a line, or JSON lines with"
        " turns; repeatable",
    )
    group.add_argument("--tokens", type=int, default=tokens, help=f"followed in each text ({tokens})")


def text_files(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The texts of `--texts` by name; reads no model.

    Raises:
        RequestError: a set has no name, or there is no such file.
    """
    files: dict[str, list[str]] = {}
    for given in arguments.texts:
        name, _, file = given.partition("=")
        if not name or not file or name in files:
            raise RequestError(f"expected --texts as NAME=FILE, each of another name; got {given!r}")
        files[name] = read_prompt_file(Path(file))[: arguments.count]
    return files


def written_sets(model: Model, arguments: argparse.Namespace) -> list[TextSet]:
    """What the flags ask for of texts as people wrote them: given ones, and pieces of held-out modules.

    Raises:
        RequestError: a text is too short to be followed.
    """
    tokens, sets = arguments.tokens, []
    if "held-out" in _asked_prompts(arguments):
        given = min(PIECE, arguments.longest_prompt)
        sets.append(TextSet(HELD_OUT, WRITTEN, held_out_pieces(model, arguments.count, given + tokens), []))
        sets[0].given.extend([given] * arguments.count)
    for name, texts in text_files(arguments).items():
        ids = [model.encode(text)[: PIECE + tokens] for text in texts]
        short = [i for i, text in enumerate(ids) if len(text) < 4]
        if short:
            raise RequestError(
                f"expected texts of at least 4 tokens in {name}; text {short[0]} has {len(ids[short[0]])}"
            )
        sets.append(TextSet(name, WRITTEN, ids, [min(PIECE, len(text) // 2) for text in ids]))
    return sets


def prompts_to_continue(
    model: Model, arguments: argparse.Namespace, as_chat: Callable[[str], str] | None
) -> dict[str, list[list[int]]]:
    """Prompts whose own continuation is followed, as token ids.

    Raises:
        RequestError: a set cannot be read.
    """
    if not _asked_prompts(arguments):
        return {}
    sets = prompt_sets(model, arguments, as_chat)
    if HELD_OUT in sets:  # the beginnings of those as written
        length = len(sets[HELD_OUT][0])
        pieces = held_out_pieces(model, arguments.count, length + arguments.tokens)
        sets[HELD_OUT] = [piece[:length] for piece in pieces]
    return sets


def own_sets(
    model: Model, prompts: dict[str, list[list[int]]], tokens: int, batch: int, ledger: Ledger
) -> Iterator[TextSet]:
    """Prompts with the exact target's greedy continuations, `batch` at a time, each a piece of the ledger."""
    for name, ids in prompts.items():
        texts: list[list[int]] = []
        for start in range(0, len(ids), batch):
            part, piece = ids[start : start + batch], f"{name}, continued, from {start}"
            if piece not in ledger:
                filled = [*part, *part[-1:] * (min(batch, len(ids)) - len(part))]  # a last batch compiles nothing
                ledger.put(piece, continued(model, filled, tokens)[: len(part)])
            texts += ledger.get(piece)
        yield TextSet(name, OWN, texts, [len(prompt) for prompt in ids])


def _asked_prompts(arguments: argparse.Namespace) -> list[str]:
    """Held-out modules where nothing is asked for."""
    return arguments.prompts or ([] if arguments.texts or arguments.answers else ["held-out"])
