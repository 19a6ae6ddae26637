"""Rows of results from the tasks of a ledger: one for each spec and each set of texts or questions."""

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
    """Make a row for each set and speculative spec. The first spec, without a budget, is compared with the others."""
    rows = []
    for texts in sets:
        sizes, exact = texts.scored_bytes(model), None
        for evaluated in specs:
            if evaluated.spec.tree is None:
                continue
            found = divergence.text_columns(ledger.get(divergence.task_name(texts, evaluated)), sizes)
            exact = exact or found
            rows.append(of_set(texts) | evaluated.columns() | found | lost_columns(found, exact))
    return rows


def of_set(texts: TextSet) -> dict[str, Any]:
    """Columns that name a set of texts."""
    return {"measured": "texts", "set": texts.name, "kind": texts.kind}


def lost_columns(found: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of the nats that the tokens of each text lose against those of `exact`."""
    lost = np.array(found["nll_by_text"]) - np.array(exact["nll_by_text"])
    return {"nats_lost": round(float(lost.mean()), 6), "nats_lost_95": interval(lost)}


def answer_rows(
    sets: Mapping[str, Sequence[Question]],
    left_out: Mapping[str, Mapping[str, int]],
    specs: Sequence[EvaluatedSpec],
    batch: int,
    ledger: Ledger,
) -> list[dict[str, Any]]:
    """Make a row for each set and spec. The first spec, plain decoding, is compared with the others."""
    rows = []
    for name, questions in sets.items():
        kinds = sorted({"number" if question.trial is None else "code" for question in questions})
        plain = accuracy.correctness(ledger, name, specs[0], len(questions), batch)
        for evaluated in specs:
            right = accuracy.correctness(ledger, name, evaluated, len(questions), batch)
            about = {"measured": "answers", "set": name, "kind": " and ".join(kinds)} | evaluated.columns()
            rows.append(about | accuracy.answer_columns(right, plain) | {"left_out": dict(left_out[name])})
    return rows
