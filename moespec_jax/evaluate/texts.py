"""Texts for teacher forcing: written by people, or continued by the exact target."""

import argparse
import dataclasses
from collections.abc import Iterator

from moespec_jax.cli.prompts import read_prompt_file
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import HELD_OUT, PIECE, continued, held_out_pieces, prompt_sets
from moespec_jax.runtime.model import Model

# Kinds of texts, in rows of results.
WRITTEN, OWN = "as written", "the target's own"


@dataclasses.dataclass(frozen=True)
class TextSet:
    """A set of texts.

    Fields:
        name: name of the set.
        kind: `WRITTEN` or `OWN`.
        texts: token ids.
        given: for each text the number of first tokens that are prefilled as a prompt.
    """

    name: str
    kind: str
    texts: list[list[int]]
    given: list[int]

    def scored_bytes(self, model: Model) -> list[int]:
        """Count the bytes of the tokens of each text that receive a probability: all after the first root."""
        pairs = zip(self.texts, self.given, strict=True)
        scored = (model.decode(text[given + 1 :], after=text[: given + 1]) for text, given in pairs)
        return [len((text or "").encode()) for text in scored]


def add_text_flags(group: argparse._ArgumentGroup, tokens: int) -> None:
    """Add `--texts` and `--tokens`."""
    group.add_argument(
        "--texts",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="texts, each teacher-forced as it is: a file with one text in each line, or JSON lines whose first item of"
        f" turns is the text (messages are none); its first {PIECE} tokens (at most half of it) are the prompt;"
        " repeatable",
    )
    group.add_argument(
        "--tokens",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens of each text after its prompt (default: {tokens})",
    )


def text_files(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Read the texts of `--texts`, by name of the set.

    Raises:
        RequestError: a set has no name, or that of another one, or its file cannot be read.
    """
    files: dict[str, list[str]] = {}
    for argument in arguments.texts:
        name, _, file = argument.partition("=")
        if not name or not file or name in files:
            raise RequestError(f"expected --texts as NAME=FILE, each of another name; got {argument!r}")
        files[name] = read_prompt_file(expanded(file))[: arguments.count]
    return files


def written_sets(model: Model, arguments: argparse.Namespace) -> list[TextSet]:
    """Make the sets of texts that people wrote: those of `--texts`, and excerpts of held-out modules.

    Raises:
        RequestError: a text is too short.
    """
    tokens, sets = arguments.tokens, []
    if "held-out" in _requested_prompts(arguments):
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


def prompts_to_continue(model: Model, arguments: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Read the prompts that the target continues, as token ids.

    Raises:
        RequestError: a set cannot be read.
    """
    if not _requested_prompts(arguments):
        return {}
    sets = prompt_sets(model, arguments)
    if HELD_OUT in sets:  # the same prompts as in `written_sets`
        length = len(sets[HELD_OUT][0])
        excerpts = held_out_pieces(model, arguments.count, length + arguments.tokens)
        sets[HELD_OUT] = [excerpt[:length] for excerpt in excerpts]
    return sets


def own_sets(
    model: Model, prompts: dict[str, list[list[int]]], tokens: int, batch: int, ledger: Ledger
) -> Iterator[TextSet]:
    """Append the exact target's greedy continuations to prompts; each batch is a task of the ledger."""
    for name, ids in prompts.items():
        texts: list[list[int]] = []
        for start in range(0, len(ids), batch):
            part, task = ids[start : start + batch], f"{name}, continued, from {start}"
            if task not in ledger:
                # A smaller last batch is filled, so that it runs the same program.
                filled = [*part, *part[-1:] * (min(batch, len(ids)) - len(part))]
                ledger.put(task, continued(model, filled, tokens)[: len(part)])
            texts += ledger.get(task)
        yield TextSet(name, OWN, texts, [len(prompt) for prompt in ids])


def _requested_prompts(arguments: argparse.Namespace) -> list[str]:
    """Values of `--prompts`; held-out modules if there are neither prompts nor texts nor answers."""
    return arguments.prompts or ([] if arguments.texts or arguments.answers else ["held-out"])
