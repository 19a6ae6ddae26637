"""Several processes, on one host or many, as one program: every one runs the same, and the first speaks for all."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.placement import put_global


def is_first_process() -> bool:
    """Whether this process speaks for all: prints, and writes what is not written in parallel."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Until every process has come here; `what` is the name of the place, the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(number: int) -> int:
    """What the first process says, on every process: clocks and disks differ, and programs must be called alike."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def fetch(array: jax.Array | np.generic) -> np.ndarray:
    """The whole of an array, on every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays that every process has, whole on every device of a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: put_global(np.asarray(leaf), sharding), tree)
