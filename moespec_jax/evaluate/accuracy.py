"""How many questions each way of decoding answers rightly, piece by piece into a ledger."""

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
    model: Model, sets: Mapping[str, Sequence[Question]], specs: Sequence[EvaluatedSpec], as_prompt: Callable[[str], list[int]],
    new: int, batch: int, ledger: Ledger,
) -> None:  # fmt: skip
    """Answer every question under every spec, greedily with at most `new` tokens, `batch` at a time, and check the
    answers. Each batch and spec is a task of the ledger: the answers' texts, and which are right."""
    starts = {name: range(0, len(questions), batch) for name, questions in sets.items()}
    tasks = [(name, start, evaluated) for name in sets for evaluated in specs for start in starts[name]]
    for name, start, evaluated in tqdm(tasks, desc="answers", unit="batch", disable=not tasks):
        task = task_name(name, evaluated, start)
        if task not in ledger:
            questions = sets[name][start : start + batch]
            prompts = [as_prompt(question.prompt) for question in questions]
            ids = continue_batch(model, evaluated, prompts, new, size=batch)
            texts = [model.decode(answer, after=prompt) or "" for answer, prompt in zip(ids, prompts, strict=True)]
            right = [question.is_right(text) for question, text in zip(questions, texts, strict=True)]
            ledger.put(task, {"answers": texts, "right": right})


def task_name(name: str, evaluated: EvaluatedSpec, start: int) -> str:
    """Name in the ledger of a batch of questions answered under one spec."""
    return f"{name}, answered, {evaluated.name}, from {start}"


def rights(ledger: Ledger, name: str, evaluated: EvaluatedSpec, count: int, batch: int) -> list[bool]:
    """Whether the answer to each question of a set is right under one spec."""
    return sum((ledger.get(task_name(name, evaluated, start))["right"] for start in range(0, count, batch)), [])


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
