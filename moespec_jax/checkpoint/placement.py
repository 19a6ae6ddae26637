"""Where parameters lie on a mesh: the sharding of every leaf of a decoder or a draft head."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.checkpoint.tensor_table import Path
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.parallel.mesh import EXPERT, Axes, MeshConfig, Split, repeated_heads, split_decoder, split_head
from moespec_jax.parallel.processes import put_global

Config = TypeVar("Config", DecoderConfig, DraftConfig)


class Placement(NamedTuple):
    """A mesh, and what of some parameters is split over which of its axes. `flat_norms`: the norms of queries and keys
    run over all heads together, and are split with them."""

    mesh: Mesh
    split: Split
    flat_norms: bool = False

    @property
    def sizes(self) -> MeshConfig:
        """Of the mesh."""
        return MeshConfig(**self.mesh.shape)

    def sharding(self, path: Path, shape: tuple[int, ...]) -> NamedSharding:
        """Of the leaf at a place of the parameters, leading axes of stacked layers included."""
        return NamedSharding(self.mesh, leaf_spec(self.split, self.flat_norms, path, len(shape)))


def decoder_placement(config: DecoderConfig, mesh: Mesh) -> Placement:
    """Of a decoder.

    Raises:
        ValueError: it cannot be spread over the mesh.
    """
    return Placement(mesh, split_decoder(config, MeshConfig(**mesh.shape)), config.qk_norm == "flat")


def head_placement(config: DraftConfig, mesh: Mesh) -> Placement:
    """Of a draft head."""
    return Placement(mesh, split_head(config, MeshConfig(**mesh.shape)))


def leaf_spec(split: Split, flat_norms: bool, path: Path, ndim: int) -> PartitionSpec:
    """Which axes of a mesh split which dimension of the leaf at `path`."""
    name, parts = str(path[-1]), [None] * ndim
    norms = split.heads if flat_norms else ()
    # The axes, and the dimension they split, counted from the last.
    attention = {"q": 2, "k": 2, "v": 2, "o": 2, "q_bias": 1, "k_bias": 1, "v_bias": 1}
    table: dict[str, tuple[Axes, int]] = {name: (split.heads, dimension) for name, dimension in attention.items()}
    table |= {"q_norm": (norms, 1), "k_norm": (norms, 1), "lm_head": (split.vocabulary, 2)}
    ffn = split.expert_ffn if path[0] == "experts" else split.ffn
    table |= {"gate": (ffn, 1), "up": (ffn, 1), "down": (ffn, 2), "gate_scale": (ffn, 1), "up_scale": (ffn, 1)}
    axes, dimension = table.get(name, ((), 1))
    spec: list[Any] = list(parts)
    if axes:
        spec[-dimension] = axes
    if path[0] == "experts" and split.experts > 1:
        spec[0] = EXPERT
    return PartitionSpec(*spec)


def with_repeated_heads(config: Config, placement: Placement) -> Config:
    """The same model with each key/value head as many times as devices need it: it computes the same."""
    repeats = repeated_heads(config, placement.sizes, placement.split)
    return dataclasses.replace(config, num_key_value_heads=config.num_key_value_heads * repeats)


def repeat_heads(array: np.ndarray, rows: int, head_dim: int) -> np.ndarray:
    """Each head of `array` `[heads * head, ...]` repeated, side by side, to make `rows` rows."""
    if len(array) == rows:
        return array
    heads = array.reshape(-1, head_dim, *array.shape[1:])
    return np.repeat(heads, rows // len(array), axis=0).reshape(rows, *array.shape[1:])


def place_head(head: DraftHead, config: DraftConfig, placement: Placement) -> DraftHead:
    """A loaded head spread over the mesh; `config` is that with repeated key/value heads."""
    kv = config.num_key_value_heads * config.head_dim

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        names: Path = tuple(getattr(step, "name", getattr(step, "idx", "")) for step in path)
        array = np.asarray(leaf)
        if names[-1] in ("k", "v", "k_bias", "v_bias"):
            array = repeat_heads(array, kv, config.head_dim)
        return put_global(array, placement.sharding(names, array.shape))

    return dataclasses.replace(jax.tree_util.tree_map_with_path(place, head), split=placement.split)
