"""Several processes, on one host or many, as one program: every one runs the same, and the first speaks for all."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.errors import CheckpointError


def is_first_process() -> bool:
    """Whether this process speaks for all: prints, and writes what is not written in parallel."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What each process does by itself, or the first alone, in this block: all go on after it, or none does.

    Raises:
        CheckpointError: another process failed, and says why.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        fine = bool(np.all(multihost_utils.process_allgather(np.array([failure is None]))))
        if failure is None and not fine:
            raise CheckpointError("expected all processes to go on; another one failed, and says why")
    if failure is not None:
        raise failure


def same_everywhere(text: str) -> bool:
    """Whether all processes give the same text."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool(np.all(multihost_utils.process_allgather(digest) == digest))


def broadcast_from_first(number: int) -> int:
    """What the first process says, on every process: clocks and disks differ, and programs must be called alike."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def fetch(array: jax.Array | np.generic) -> np.ndarray:
    """The whole of an array, on every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays that every process has, whole on every device of a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: put_global(np.asarray(leaf), sharding), tree)


def put_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The array on the devices of a mesh, of whatever processes: every process has the whole of it, and puts what its
    own devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
