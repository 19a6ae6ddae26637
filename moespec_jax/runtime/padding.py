"""Padding of a batch to the devices of a mesh: finished sequences, which nothing reports."""

import jax
from jax.sharding import Mesh

from moespec_jax.decoding.round_info import RoundInfo
from moespec_jax.parallel.mesh import DATA
from moespec_jax.parallel.processes import fetch


def padded(prompts: list[list[int]], limit: list[int], mesh: Mesh | None) -> tuple[list[list[int]], list[int]]:
    """Prompts and limits, padded with finished sequences to a multiple of a mesh's `data` axis."""
    missing = 0 if mesh is None else -len(prompts) % mesh.shape[DATA]
    return [*prompts, *[[0]] * missing], [*limit, *[1] * missing]


def without_padding(info: RoundInfo, count: int) -> RoundInfo:
    """Measurements of the first `count` sequences, on the host."""
    info = jax.tree.map(fetch, info)
    tree, accepted = (jax.tree.map(lambda x: x[:count], part) for part in (info.tree, info.accepted))
    return info._replace(
        active=info.active[:count],
        selected=info.selected[:, :count],
        read=info.read[:, :count],
        tree=tree,
        accepted=accepted,
    )
