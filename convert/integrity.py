"""Is a checkpoint what its publisher meant? Values that are not finite, and files that are not what the hub holds.

A flipped bit inside a tensor is a value like any other: only a checksum can tell. Safetensors and orbax have none; the
hub names large files by their SHA-256 and small ones by git's hash, and its downloads keep that name beside them.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from moespec_jax.checkpoint.leaves import Source
from moespec_jax.errors import CheckpointError
from moespec_jax.files import listing

ALLOW = "--allow-non-finite"
_BLOCK = 1 << 22


def count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite, counted in strips: a mask as large as the tensor would be memory too."""
    if not array.ndim:
        return int(not np.isfinite(array))
    rows = max(1, _BLOCK // max(1, array[:1].size))
    return sum(int((~np.isfinite(array[at : at + rows])).sum()) for at in range(0, len(array), rows))


def only_finite(source: Source) -> Source:
    """The same source, which refuses the first tensor that holds something else.

    Raises:
        CheckpointError: when it is read.
    """

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in source.read(names):
            refuse_not_finite([(name, array)], f"{ALLOW} converts it as it is")
            yield name, array

    return Source(source.dtypes, read)


def refuse_not_finite(tensors: Iterable[tuple[str, np.ndarray]], advice: str) -> None:
    """Name every tensor that holds a value which is not finite.

    Raises:
        CheckpointError: there are such.
    """
    found = {name: (count, array.size) for name, array in tensors if (count := count_not_finite(array))}
    if found:
        told = listing([f"{name} ({count} of {size} are not)" for name, (count, size) in found.items()])
        raise CheckpointError(f"expected weights that are finite; came {told}; {advice}")


def check_hashes(directory: Path) -> tuple[int, int]:
    """How many files are what the hub holds, and of how many nothing is known.

    Raises:
        CheckpointError: some differ, or are named and not there; all are told.
    """
    right, unknown, wrong = 0, 0, []
    for file in sorted(path for path in directory.iterdir() if path.is_symlink() or path.is_file()):
        expected = _hub_hash(file)
        if not file.exists():
            wrong.append(f"{file.name} (not downloaded)")
        elif expected is None:
            unknown += 1
        elif expected != (came := _hash(file, git=len(expected) == 40)):
            wrong.append(f"{file.name} ({came[:12]}... in place of {expected[:12]}...)")
        else:
            right += 1
    if wrong:
        raise CheckpointError(f"expected files as the hub has them in {directory}; came {listing(wrong)}")
    return right, unknown


def _hub_hash(file: Path) -> str | None:
    """What the hub calls a file's content: the name of the blob that a cached file is a link to, or the second line of
    what a download into a directory notes beside it."""
    target = file.resolve()
    name = target.name if file.is_symlink() and target.parent.name == "blobs" else ""
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if not name and note.is_file():
        name = "".join(note.read_text(encoding="utf-8", errors="replace").splitlines()[1:2]).strip('"')
    return name if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def _hash(file: Path, git: bool) -> str:
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode()) if git else hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(_BLOCK):
            digest.update(part)
    return digest.hexdigest()
