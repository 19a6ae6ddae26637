"""The draft vocabulary: which of the target's tokens a head knows, and the two published maps that say so.

`d2t[i]` is what is added to draft token i to give the target's token (not that token itself); `t2d[t]` is whether the
target's token t is in the draft vocabulary (EAGLE-3, arXiv:2503.01840, reference implementation).
"""

import numpy as np

from moespec_jax.errors import CheckpointError


def read_target_ids(
    d2t: np.ndarray | None, t2d: np.ndarray | None, vocab: int, draft_vocab: int, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The target's token of every draft token, int32 `[draft_vocab]` and ascending, and what is to be warned of.

    Without `d2t` the vocabularies must be equally large, and the map is the identity. `t2d` may be absent.

    Raises:
        CheckpointError: the maps have another size or type, leave the vocabulary, are not strictly increasing, or
            contradict each other.
    """
    known = None if t2d is None else _known_tokens(t2d, vocab, where)
    if d2t is None:
        if draft_vocab != vocab:
            raise CheckpointError(f"expected d2t for {draft_vocab} of {vocab} tokens; there is none in {where}")
        ids, notes = np.arange(vocab), ()
    else:
        ids, notes = _from_offsets(d2t, known, vocab, draft_vocab, where)
    if known is not None and not np.array_equal(ids, known):
        raise CheckpointError(
            f"expected d2t and t2d to name the same tokens; {where} has {len(ids)} and {len(known)}, unlike each other"
        )
    return ids.astype(np.int32), notes


def vocabulary_maps(target_ids: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The published maps of ascending token ids: `d2t` int64 `[draft_vocab]` and `t2d` bool `[vocab]`.

    Raises:
        CheckpointError: the ids are not strictly increasing within the vocabulary.
    """
    ids = np.asarray(target_ids).astype(np.int64)
    if not _is_ascending(ids, vocab):
        raise CheckpointError(f"expected target_ids strictly increasing and below {vocab}; the head's are not")
    t2d = np.zeros(vocab, bool)
    t2d[ids] = True
    return ids - np.arange(len(ids)), t2d


def _from_offsets(
    d2t: np.ndarray, known: np.ndarray | None, vocab: int, draft_vocab: int, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    if d2t.shape != (draft_vocab,) or d2t.dtype.kind != "i":
        raise CheckpointError(f"expected d2t as {draft_vocab} integers; came {d2t.dtype}{list(d2t.shape)} in {where}")
    # Ids that ascend from 0 or more are nowhere below their index, so no offset is negative, nor as large as the vocab.
    sane = draft_vocab > 0 and d2t.min() >= 0 and d2t.max() < vocab
    ids = d2t.astype(np.int64) + np.arange(draft_vocab) if sane else None
    if ids is not None and _is_ascending(ids, vocab) and (known is None or np.array_equal(ids, known)):
        return ids, ()
    if sane and known is not None and np.array_equal(d2t, known):
        return d2t.astype(np.int64), ("d2t holds the target's ids themselves, as t2d shows, and is read so",)
    if ids is not None and _is_ascending(ids, vocab):
        return ids, ()
    raise CheckpointError(
        f"expected d2t as offsets that make token ids strictly increasing and below {vocab}; those in {where} do not"
    )


def _known_tokens(t2d: np.ndarray, vocab: int, where: str) -> np.ndarray:
    if t2d.shape != (vocab,) or t2d.dtype.kind not in "biu":
        raise CheckpointError(f"expected t2d as {vocab} booleans; came {t2d.dtype}{list(t2d.shape)} in {where}")
    return np.nonzero(t2d)[0]


def _is_ascending(ids: np.ndarray, vocab: int) -> bool:
    return bool(ids.size and ids[0] >= 0 and ids[-1] < vocab and np.all(ids[:-1] < ids[1:]))
