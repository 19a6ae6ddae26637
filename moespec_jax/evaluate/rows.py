"""Rows of results, from the pieces of a ledger: one for each way and each set of texts or questions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moespec_jax.evaluate import accuracy, divergence
from moespec_jax.evaluate.answers import Question
from moespec_jax.evaluate.specs import EvaluatedSpec
from moespec_jax.evaluate.texts import TextSet
from moespec_jax.measure.fidelity import interval
from moespec_jax.measure.ledger import Ledger
from moespec_jax.runtime.model import Model


def text_rows(
    model: Model, sets: Sequence[TextSet], specs: Sequence[EvaluatedSpec], ledger: Ledger
) -> list[dict[str, Any]]:
    """How far every way that drafts is from the exact target; first the one without a budget, that others are held
    against text by text."""
    rows = []
    for texts in sets:
        sizes, exact = texts.scored_bytes(model), None
        for evaluated in specs:
            if evaluated.spec.tree is None:
                continue
            found = divergence.figures(ledger.get(divergence.task_name(texts, evaluated)), sizes)
            exact = exact or found
            lost = np.array(found["nll_by_text"]) - np.array(exact["nll_by_text"])
            found |= {"nats_lost": round(float(lost.mean()), 6), "nats_lost_95": interval(lost)}
            rows.append({"measured": "texts", "set": texts.name, "kind": texts.kind} | evaluated.columns() | found)
    return rows


def answer_rows(
    sets: Mapping[str, Sequence[Question]],
    left_out: Mapping[str, Mapping[str, int]],
    specs: Sequence[EvaluatedSpec],
    batch: int,
    ledger: Ledger,
) -> list[dict[str, Any]]:
    """How often every way answers rightly; first plain decoding, that others are held against question by question."""
    rows = []
    for name, asked in sets.items():
        kinds = sorted({"number" if question.trial is None else "code" for question in asked})
        plain = accuracy.rights(ledger, name, specs[0], len(asked), batch)
        for evaluated in specs:
            right = accuracy.rights(ledger, name, evaluated, len(asked), batch)
            about = {"measured": "answers", "set": name, "kind": " and ".join(kinds)} | evaluated.columns()
            rows.append(about | accuracy.figures(right, plain) | {"left_out": dict(left_out[name])})
    return rows
