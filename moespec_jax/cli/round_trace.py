"""Trace of a run: JSON lines, one for each round and sequence."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from moespec_jax.decoding.round_info import RoundInfo, RoundShape
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded, json_line
from moespec_jax.runtime.run import OnRound


@contextlib.contextmanager
def tracing(path: str | None) -> Iterator[OnRound | None]:
    """Open a trace: a function that writes each round; `path` appears when the trace is complete. None without a path.

    Raises:
        RequestError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    file_name = expanded(path)
    if not file_name.name or file_name.is_dir():
        raise RequestError(f"expected a file to write a trace to; got {path!r}")
    temporary = file_name.with_name(file_name.name + ".incomplete")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield lambda number, info: _write_round(file, number, info)
        os.replace(temporary, file_name)
    except OSError as error:
        raise RequestError(f"expected to write a trace to {path}; {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def round_records(number: int, info: RoundInfo) -> Iterator[dict[str, Any]]:
    """Make one record for every sequence that took part in a round.

    Its keys:
        sequence, round: indices from 0.
        shape: size, depth and top-k of the tree (`60/7/10`); None in a plain round.
        predicted_s, predicted_tokens: where costs decided the shape, the seconds of such a round and the tokens that it
            was expected to gain; else None.
        root: token id of the root.
        tokens, parents, scores: nodes of the tree, the root first; scores are log-probabilities of the paths.
        accepted: indices of the accepted nodes after the root.
        bonus: token id after the last accepted node.
        shortlist: for each sparse layer the experts that a budget allowed for the batch, best first; None without one.
        experts: for each sparse layer the experts that rows of this sequence used.
        mass_kept: for each sparse layer the shortlist's share of the scores; 1 without a budget.
    """
    tree, accepted = info.tree, info.accepted
    assert tree is not None and accepted is not None
    for sequence in np.flatnonzero(info.active).tolist():
        count, shape = int(accepted.count[sequence]), info.shape or RoundShape(None)
        layers, num_experts, budget = info.read.shape[0], info.read.shape[2], info.budget
        yield {
            "sequence": sequence,
            "round": number,
            "shape": shape.tree,
            "predicted_s": shape.seconds,
            "predicted_tokens": None if shape.tokens is None else round(shape.tokens, 6),
            "root": int(tree.tokens[sequence, 0]),
            "tokens": tree.tokens[sequence].tolist(),
            "parents": tree.parents[sequence].tolist(),
            "scores": [round(float(score), 6) for score in tree.scores[sequence]],
            "accepted": accepted.path[sequence, 1:count].tolist(),
            "bonus": int(accepted.bonus[sequence]),
            "shortlist": budget and [[e for e in layer if e < num_experts] for layer in budget.shortlist.tolist()],
            "experts": [np.flatnonzero(info.read[layer, sequence]).tolist() for layer in range(layers)],
            "mass_kept": [1.0] * layers if budget is None else [round(kept, 6) for kept in budget.mass_kept.tolist()],
        }


def _write_round(file: TextIO, number: int, info: RoundInfo) -> None:
    for record in round_records(number, info):
        file.write(json_line(record))
