"""How many questions each way of decoding answers rightly, piece by piece into a ledger."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from moespec_jax.evaluate.answers import Question
from moespec_jax.evaluate.generation import continue_batch
from moespec_jax.evaluate.intervals import paired, wilson
from moespec_jax.evaluate.ways import Way
from moespec_jax.measure.ledger import Ledger
from moespec_jax.runtime.model import Model


def answer(
    model: Model, sets: Mapping[str, Sequence[Question]], ways: Sequence[Way], as_prompt: Callable[[str], list[int]],
    new: int, batch: int, ledger: Ledger,
) -> None:  # fmt: skip
    """Answer every question in every way, greedily with at most `new` tokens, `batch` at a time, and check the answers;
    each batch and way is a piece: the answers' texts, and which are right."""
    jobs = [(name, start, way) for name, asked in sets.items() for way in ways for start in range(0, len(asked), batch)]
    for name, start, way in tqdm(jobs, desc="answers", unit="batch", disable=not jobs):
        piece = piece_name(name, way, start)
        if piece not in ledger:
            asked = sets[name][start : start + batch]
            prompts = [as_prompt(question.prompt) for question in asked]
            ids = continue_batch(model, way, prompts, new, size=batch)
            texts = [model.decode(said, after=prompt) or "" for said, prompt in zip(ids, prompts, strict=True)]
            right = [question.is_right(text) for question, text in zip(asked, texts, strict=True)]
            ledger.put(piece, {"answers": texts, "right": right})


def piece_name(name: str, way: Way, start: int) -> str:
    """What the ledger calls a batch of questions answered in one way."""
    return f"{name}, answered, {way.name}, from {start}"


def rights(ledger: Ledger, name: str, way: Way, count: int, batch: int) -> list[bool]:
    """Which questions of a set one way answered rightly."""
    return sum((ledger.get(piece_name(name, way, start))["right"] for start in range(0, count, batch)), [])


def figures(right: Sequence[bool], plain: Sequence[bool]) -> dict[str, Any]:
    """One row's figures: the share of right answers with Wilson's 95 % interval, and the questions in which it differs
    from plain decoding."""
    low, high = wilson(sum(right), len(right))
    pairs = paired(plain, right)
    return {
        "questions": len(right),
        "right": sum(right),
        "accuracy": round(sum(right) / len(right), 5),
        "accuracy_95": [round(low, 5), round(high, 5)],
        "lost": pairs.first_only,
        "gained": pairs.second_only,
        "mcnemar_p": round(pairs.p, 6),
    }
