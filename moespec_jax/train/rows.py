"""Samples packed into rows of equal length, and the rows of each training step, which are a function of the step."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moespec_jax.train.records import Sample


class Rows(NamedTuple):
    """Packed samples.

    Fields:
        ids: token ids, int32 `[rows, length]`; padding is 0.
        counts: mask of the tokens that the head learns to predict, `[rows, length]`; False for padding.
    """

    ids: np.ndarray
    counts: np.ndarray

    def batch(self, step: int, size: int, seed: int) -> "Rows":
        """Select the rows of a step: without replacement within an epoch, in another order in each."""
        total = len(self.ids)
        picks = [_order(seed, i // total, total)[i % total] for i in range(step * size, (step + 1) * size)]
        return Rows(self.ids[picks], self.counts[picks])


def pack(samples: Iterable[Sample], length: int) -> Rows:
    """Fill rows with one sample after another.

    A sample that fits into a row is not divided. Of a longer one, each part begins with the last token of the part
    before. Attention is not masked between the samples of a row.
    """
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    room = 0
    for sample in samples:
        for start in range(0, max(len(sample.ids) - 1, 0), length - 1):
            part, counted = sample.ids[start : start + length], sample.counts[start : start + length]
            if len(part) > room:
                ids.append(np.zeros(length, np.int32))
                counts.append(np.zeros(length, bool))
                room = length
            begin = length - room
            ids[-1][begin : begin + len(part)], counts[-1][begin : begin + len(part)] = part, counted
            room -= len(part)
    return (
        Rows(np.stack(ids), np.stack(counts))
        if ids
        else Rows(np.zeros((0, length), np.int32), np.zeros((0, length), bool))
    )


def draft_vocabulary(rows: Rows, vocab_size: int, draft_vocab_size: int) -> np.ndarray:
    """Choose the most frequent ids among the tokens that count, ascending; ties go to the lower id."""
    occurrences = np.bincount(rows.ids[rows.counts], minlength=vocab_size)
    return np.sort(np.argsort(-occurrences, kind="stable")[:draft_vocab_size]).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(total)
