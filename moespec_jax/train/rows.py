"""Samples packed into rows of one length, and which rows each step trains on: a function of the step alone."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moespec_jax.train.records import Sample


class Rows(NamedTuple):
    """Token ids `[rows, length]` and which of them the head is to predict; padding is token 0 and never counts."""

    ids: np.ndarray
    counts: np.ndarray

    def batch(self, step: int, size: int, seed: int) -> "Rows":
        """The rows of a step, without replacement within an epoch and in a new order in every one."""
        total = len(self.ids)
        picks = [_order(seed, i // total, total)[i % total] for i in range(step * size, (step + 1) * size)]
        return Rows(self.ids[picks], self.counts[picks])


def pack(samples: Iterable[Sample], length: int) -> Rows:
    """Rows filled with one sample after another. A sample that fits a row is never cut; a longer one is, each piece
    beginning with the last token of the one before. Samples in one row see those before them, as in a stream."""
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    room = 0
    for sample in samples:
        for start in range(0, max(len(sample.ids) - 1, 0), length - 1):
            piece, matters = sample.ids[start : start + length], sample.counts[start : start + length]
            if len(piece) > room:
                ids.append(np.zeros(length, np.int32))
                counts.append(np.zeros(length, bool))
                room = length
            begin = length - room
            ids[-1][begin : begin + len(piece)], counts[-1][begin : begin + len(piece)] = piece, matters
            room -= len(piece)
    return (
        Rows(np.stack(ids), np.stack(counts))
        if ids
        else Rows(np.zeros((0, length), np.int32), np.zeros((0, length), bool))
    )


def draft_vocabulary(rows: Rows, vocab_size: int, draft_vocab_size: int) -> np.ndarray:
    """The ids that occur most among tokens to be predicted, ascending; unused low ids fill up what is left."""
    occurrences = np.bincount(rows.ids[rows.counts], minlength=vocab_size)
    return np.sort(np.argsort(-occurrences, kind="stable")[:draft_vocab_size]).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(total)
