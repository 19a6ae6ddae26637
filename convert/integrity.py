"""Integrity of a checkpoint: values that are not finite, and files that differ from the hub's.

A flipped bit in a tensor usually gives a valid value, which only a checksum detects. Safetensors and orbax have none.
The hub identifies large files by their SHA-256 and small ones by git's hash, and its downloads store these identifiers.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from convert import ALLOW_NON_FINITE
from moespec_jax.checkpoint.leaves import Source
from moespec_jax.errors import CheckpointError
from moespec_jax.files import listing

_BLOCK = 1 << 22


def count_not_finite(array: np.ndarray) -> int:
    """Count the values that are NaN or infinite, in strips: a mask of the whole tensor would add to peak memory."""
    if not array.ndim:
        return int(not np.isfinite(array))
    rows = max(1, _BLOCK // max(1, array[:1].size))
    return sum(int((~np.isfinite(array[at : at + rows])).sum()) for at in range(0, len(array), rows))


def only_finite(source: Source) -> Source:
    """Wrap a source: reading a tensor that is not finite raises `CheckpointError`."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in source.read(names):
            check_finite([(name, array)], f"{ALLOW_NON_FINITE} converts it unchanged")
            yield name, array

    return source._replace(read=read)


def check_finite(tensors: Iterable[tuple[str, np.ndarray]], advice: str) -> None:
    """Check that all values are finite. `advice` ends the error message.

    Raises:
        CheckpointError: some are not; the message names the tensors.
    """
    found = {name: (count, array.size) for name, array in tensors if (count := count_not_finite(array))}
    if found:
        names = listing([f"{name} ({count} of {size} are not)" for name, (count, size) in found.items()])
        raise CheckpointError(f"expected weights that are finite; got {names}; {advice}")


def check_hashes(directory: Path) -> tuple[int, int]:
    """Compare files with the hub's hashes of them; return the numbers of equal files and of those without a known hash.

    Raises:
        CheckpointError: some differ, or are links to missing files; the message names them.
    """
    equal, unknown, wrong = 0, 0, []
    for file in sorted(path for path in directory.iterdir() if path.is_symlink() or path.is_file()):
        expected = _hub_hash(file)
        if not file.exists():
            wrong.append(f"{file.name} (not downloaded)")
        elif expected is None:
            unknown += 1
        elif expected != (actual := _hash(file, git=len(expected) == 40)):
            wrong.append(f"{file.name} ({actual[:12]}... in place of {expected[:12]}...)")
        else:
            equal += 1
    if wrong:
        raise CheckpointError(f"expected files as the hub has them in {directory}; got {listing(wrong)}")
    return equal, unknown


def _hub_hash(file: Path) -> str | None:
    """Return the hub's hash of a file: the name of the blob that a cached file links to, or the second line of the
    metadata that a download into a directory stores; None where there is neither."""
    target = file.resolve()
    name = target.name if file.is_symlink() and target.parent.name == "blobs" else ""
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if not name and metadata.is_file():
        name = "".join(metadata.read_text(encoding="utf-8", errors="replace").splitlines()[1:2]).strip('"')
    return name if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def _hash(file: Path, git: bool) -> str:
    """Compute the SHA-256 of a file, or git's hash of it."""
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode()) if git else hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
