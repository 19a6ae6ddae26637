"""Padding of a batch: of its arrays to fixed sizes, and to the devices of a mesh by finished sequences, which nothing
reports."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from moespec_jax.decoding.round_info import RoundInfo
from moespec_jax.decoding.states import NO_TOKEN
from moespec_jax.parallel.mesh import DATA
from moespec_jax.parallel.processes import fetch

_STOP_SLOTS = 8


def in_rows(prompts: Sequence[Sequence[int]], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays `[prompts, slots]` of the prompts' ids, padded on the right, and of their lengths."""
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def stop_slots(stop_ids: Sequence[int]) -> np.ndarray:
    """Array of the stop ids, padded so that neither their absence nor a few more of them compile anything anew."""
    return np.array([*stop_ids, *[NO_TOKEN] * max(1, _STOP_SLOTS - len(stop_ids))], np.int32)


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
