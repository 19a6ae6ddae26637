"""The draft vocabulary, the target's tokens that a head can draft, and its two published maps.

`d2t[i]` is an offset: draft token i is the target's token i + d2t[i]. `t2d[t]` is true where the target's token t is in
the draft vocabulary (reference implementation of EAGLE-3, arXiv:2503.01840). Most heads list tokens by id; those of
NVIDIA's ModelOpt list them by frequency, so that offsets may be negative.
"""

import numpy as np

from moespec_jax.errors import CheckpointError


def read_target_ids(
    d2t: np.ndarray | None, t2d: np.ndarray | None, vocab: int, draft_vocab: int, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the target's id of every draft token, int32 `[draft_vocab]`, in the order of the head's output matrix, and
    warnings.

    Without `d2t` the vocabularies must be of equal size, and the map is the identity. `t2d` may be absent.

    Raises:
        CheckpointError: a map has another size or type, an id is outside the vocabulary, two are equal, or the maps
            contradict each other.
    """
    selected = None if t2d is None else _selected_ids(t2d, vocab, where)
    if d2t is None:
        if draft_vocab != vocab:
            raise CheckpointError(f"expected d2t for {draft_vocab} of {vocab} tokens; there is none in {where}")
        ids, notes = np.arange(vocab), ()
    else:
        ids, notes = _from_offsets(d2t, selected, vocab, draft_vocab, where)
    if selected is not None and not np.array_equal(np.sort(ids), selected):
        raise CheckpointError(
            f"expected d2t and t2d to name the same tokens; {where} has {len(ids)} and {len(selected)}, which differ"
        )
    return ids.astype(np.int32), notes


def vocabulary_maps(target_ids: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the published maps of increasing token ids: `d2t` int64 `[draft_vocab]` and `t2d` bool `[vocab]`.

    Raises:
        CheckpointError: the ids are not strictly increasing within the vocabulary.
    """
    ids = np.asarray(target_ids).astype(np.int64)
    if not _is_increasing(ids, vocab):
        raise CheckpointError(f"expected target_ids strictly increasing and below {vocab}; the head's are not")
    t2d = np.zeros(vocab, bool)
    t2d[ids] = True
    return ids - np.arange(len(ids)), t2d


def _from_offsets(
    d2t: np.ndarray, selected: np.ndarray | None, vocab: int, draft_vocab: int, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the target's ids `[draft_vocab]` of `d2t`, and warnings. Some heads publish ids in place of offsets, which
    `t2d` (`selected`) reveals."""
    if d2t.shape != (draft_vocab,) or d2t.dtype.kind != "i":
        raise CheckpointError(f"expected d2t as {draft_vocab} integers; got {d2t.dtype}{list(d2t.shape)} in {where}")
    # Compared before they are added: the sum of an offset and an index may overflow.
    in_range = draft_vocab > 0 and d2t.min() > -vocab and d2t.max() < vocab
    ids, stored = d2t.astype(np.int64) + np.arange(draft_vocab) if in_range else None, d2t.astype(np.int64)
    if selected is not None and np.array_equal(np.sort(stored), selected):
        if ids is None or not np.array_equal(np.sort(ids), selected):
            return stored, ("d2t holds the target's ids themselves, as t2d shows, and is read so",)
    if ids is None or not _is_vocabulary(ids, vocab):
        raise CheckpointError(
            f"expected d2t as offsets that make token ids different and below {vocab}; those in {where} do not"
        )
    if selected is None and np.any(stored) and _is_vocabulary(stored, vocab):
        return ids, (
            "d2t is ambiguous without t2d: read as offsets, as engines do; if it holds the target's ids themselves,"
            " accuracy is low in python -m convert.probe_draft",
        )
    return ids, ()


def _selected_ids(t2d: np.ndarray, vocab: int, where: str) -> np.ndarray:
    """Return the ids of the target's tokens for which `t2d` is true."""
    if t2d.shape != (vocab,) or t2d.dtype.kind not in "biu":
        raise CheckpointError(f"expected t2d as {vocab} booleans; got {t2d.dtype}{list(t2d.shape)} in {where}")
    return np.nonzero(t2d)[0]


def _is_vocabulary(ids: np.ndarray, vocab: int) -> bool:
    """Test whether ids are different and within the vocabulary."""
    return bool(ids.size and ids.min() >= 0 and ids.max() < vocab and len(np.unique(ids)) == len(ids))


def _is_increasing(ids: np.ndarray, vocab: int) -> bool:
    """Test whether ids are strictly increasing and within the vocabulary."""
    return bool(ids.size and ids[0] >= 0 and ids[-1] < vocab and np.all(ids[:-1] < ids[1:]))
