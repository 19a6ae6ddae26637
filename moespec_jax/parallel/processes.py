"""Programs of several processes, on one host or many: all run the same computation, the first writes the output."""

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
    """Test whether this is the process that prints, and that writes files which are not written in parallel."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Synchronise all processes after the block, which each runs separately or the first alone; where it fails in one,
    all raise.

    Raises:
        CheckpointError: another process failed; the reason is in its own output.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        all_succeeded = bool(np.all(multihost_utils.process_allgather(np.array([failure is None]))))
        if failure is None and not all_succeeded:
            raise CheckpointError("expected all processes to go on; another one failed, and says why")
    if failure is not None:
        raise failure


def same_everywhere(text: str) -> bool:
    """Test whether `text` is the same in all processes."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool(np.all(multihost_utils.process_allgather(digest) == digest))


def broadcast_from_first(number: int) -> int:
    """Broadcast an int32 from the first process, for decisions from clocks and disks, on which all must agree."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def fetch(array: jax.Array | np.generic) -> np.ndarray:
    """Copy a whole array, of all its shards, to every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Replicate a tree of arrays, which every process has, on every device of a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: put_global(np.asarray(leaf), sharding), tree)


def put_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Shard an array, which every process has, over the devices of a mesh of all processes: each process places the
    shards of its own devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
