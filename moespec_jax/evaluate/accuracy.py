"""Accuracy of answers under every spec; each batch of answers is a task of a ledger."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from moespec_jax.evaluate.answers import Question
from moespec_jax.evaluate.generation import continue_batch
from moespec_jax.evaluate.intervals import paired, wilson
from moespec_jax.evaluate.specs import EvaluatedSpec
from moespec_jax.measure.ledger import Ledger
from moespec_jax.runtime.model import Model


def answer(
    model: Model,
    sets: Mapping[str, Sequence[Question]],
    specs: Sequence[EvaluatedSpec],
    as_prompt: Callable[[Question], list[int]],
    new: int,
    batch: int,
    ledger: Ledger,
) -> None:
    """Answer all questions under every spec by greedy decoding, and check the answers.

    Each batch and spec is a task of the ledger, with the texts of the answers and whether each is correct.

    Args:
        model: target and draft head.
        sets: questions by name of the set.
        specs: how to decode.
        as_prompt: token ids of a question.
        new: largest number of tokens of an answer.
        batch: number of questions that are answered at once.
        ledger: receives the answers.
    """
    starts = {name: range(0, len(questions), batch) for name, questions in sets.items()}
    tasks = [(name, start, evaluated) for name in sets for evaluated in specs for start in starts[name]]
    for name, start, evaluated in tqdm(tasks, desc="answers", unit="batch", disable=not tasks):
        task = task_name(name, evaluated, start)
        if task not in ledger:
            questions = sets[name][start : start + batch]
            prompts = [as_prompt(question) for question in questions]
            ids = continue_batch(model, evaluated, prompts, new, size=batch)
            texts = [model.decode(answer, after=prompt) or "" for answer, prompt in zip(ids, prompts, strict=True)]
            right = [question.is_right(text) for question, text in zip(questions, texts, strict=True)]
            ledger.put(task, {"answers": texts, "right": right})


def task_name(name: str, evaluated: EvaluatedSpec, start: int) -> str:
    """Name in the ledger of a batch of questions answered under one spec."""
    return f"{name}, answered, {evaluated.name}, from {start}"


def correctness(ledger: Ledger, name: str, evaluated: EvaluatedSpec, count: int, batch: int) -> list[bool]:
    """Read from the ledger whether the answer to each of the `count` questions of a set is correct under one spec."""
    return sum((ledger.get(task_name(name, evaluated, start))["right"] for start in range(0, count, batch)), [])


def answer_columns(right: Sequence[bool], plain: Sequence[bool]) -> dict[str, Any]:
    """Columns of a row: share of correct answers with Wilson's 95 % interval, and comparison with plain decoding."""
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
