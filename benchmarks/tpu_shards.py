"""How target, draft head and caches are split over the chips of a mesh where the compiler distributes the program.

Every matrix is split along one dimension: attention by heads, experts and MLPs by their ffn dimension, embedding and
output heads by vocabulary, caches by key/value heads. The rest is on every chip whole.

A chip's share of an expert's `gate` and `up` may be narrower than its 128 lanes. By default such an array is laid out
along its other dimension, to save the padding, and the program copies it back into rows at every call; so it is laid
out in rows from the start, padded.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ALL = ("heads", "group")  # both axes of the mesh

# Name of a leaf -> the dimension that is split, counted from the last.
_ATTENTION_AND_VOCABULARY = {"q": 2, "k": 2, "v": 2, "o": 2, "embed": 2, "lm_head": 2}
_MLP = {"gate": 1, "up": 1, "down": 2}


def make_mesh(devices: Sequence[Any], kv_heads: int) -> Mesh:
    """`heads` is as long as there are key/value heads to split, `group` splits the queries that share one."""
    heads = min(len(devices), kv_heads)
    shape = (heads, len(devices) // heads)
    return Mesh(np.array(devices).reshape(shape), ALL, axis_types=(AxisType.Auto,) * 2)


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """For parameters of target and head, wherever in them `experts`, `mlp` and `attention` are."""

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding | Format:
        name = _name(path[-1])
        axis = "heads" if name in ("k", "v") else ALL
        sharding = _split(mesh, leaf, (_ATTENTION_AND_VOCABULARY | _MLP).get(name), axis)
        return Format(Layout(tuple(range(leaf.ndim))), sharding) if name in _MLP else sharding

    return jax.tree_util.tree_map_with_path(choose, params)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """For a state of speculative decoding: caches by head, all else whole."""

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stored = {_name(step) for step in path} & {"k", "v"}
        return _split(mesh, leaf, 3 if stored else None, "heads")

    return jax.tree_util.tree_map_with_path(choose, state)


def _split(mesh: Mesh, leaf: Any, dimension: int | None, axis: str | tuple[str, ...]) -> NamedSharding:
    """`leaf` split along its `dimension`-th last dimension, or whole where there is none or it does not divide."""
    axes = (axis,) if isinstance(axis, str) else axis
    ways = np.prod([mesh.shape[one] for one in axes])
    if dimension is None or leaf.ndim < dimension or leaf.shape[-dimension] % ways:
        return NamedSharding(mesh, PartitionSpec())
    parts: list[Any] = [None] * leaf.ndim
    parts[-dimension] = axis
    return NamedSharding(mesh, PartitionSpec(*parts))


def _name(step: Any) -> str:
    return str(getattr(step, "name", getattr(step, "idx", step)))
