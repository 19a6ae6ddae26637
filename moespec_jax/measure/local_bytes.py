"""Bytes of a tree of arrays on one device."""

import math
from typing import Any

import jax


def local_size(leaf: Any) -> int:
    """Count the elements of an array, or of an abstract one, on one device."""
    sharding = getattr(leaf, "sharding", None)
    return math.prod(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def local_bytes(tree: Any) -> int:
    """Count the bytes of a tree on one device, without padding."""
    return sum(local_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
