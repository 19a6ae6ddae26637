"""Sharding of parameters on a mesh, for every leaf of a decoder or a draft head."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.checkpoint.tensor_table import Path
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.parallel.mesh import EXPERT, Axes, MeshConfig, ShardingPlan, repeated_heads, shard_decoder, shard_head
from moespec_jax.parallel.processes import put_global

Config = TypeVar("Config", bound=DecoderConfig | DraftConfig | DFlashConfig)
Head = TypeVar("Head", bound=DraftHead | DFlashHead)


class Placement(NamedTuple):
    """Sharding of some parameters on a mesh.

    Fields:
        mesh: devices.
        plan: what is split over which of its axes.
        flat_norms: whether the norms of queries and keys run over all heads together, and are split with them.
    """

    mesh: Mesh
    plan: ShardingPlan
    flat_norms: bool = False

    @property
    def sizes(self) -> MeshConfig:
        """Number of devices along each axis."""
        return MeshConfig(**self.mesh.shape)

    def sharding(self, path: Path, shape: tuple[int, ...]) -> NamedSharding:
        """Sharding of the leaf at `path`, of the shape with the leading axes of stacked layers."""
        return NamedSharding(self.mesh, leaf_spec(self.plan, self.flat_norms, path, len(shape)))


def decoder_placement(config: DecoderConfig, mesh: Mesh) -> Placement:
    """Sharding of a decoder's parameters.

    Raises:
        ValueError: experts or heads do not divide evenly.
    """
    return Placement(mesh, shard_decoder(config, MeshConfig(**mesh.shape)), config.qk_norm == "flat")


def head_placement(config: DraftConfig | DFlashConfig, mesh: Mesh) -> Placement:
    """Sharding of a draft head's parameters."""
    return Placement(mesh, shard_head(config, MeshConfig(**mesh.shape)))


def leaf_spec(plan: ShardingPlan, flat_norms: bool, path: Path, ndim: int) -> PartitionSpec:
    """Spec of the leaf at `path`: one logical axis of it is split, or none; routed experts have their own besides.

    Raises:
        ValueError: there is no leaf of that name.
    """
    name = next(str(step) for step in reversed(path) if isinstance(step, str))
    if name not in _SPLIT and name not in _REPLICATED:
        raise ValueError(f"expected the leaf of a decoder or a draft head; {'/'.join(map(str, path))} has no sharding")
    logical_axis, dimension = _SPLIT.get(name, (None, 1))
    axes: dict[str | None, Axes] = {
        None: (),
        "heads": plan.heads,
        "norm over heads": plan.heads if flat_norms else (),
        "vocabulary": plan.vocabulary,
        "ffn": plan.expert_ffn if path[0] == "experts" else plan.ffn,
    }
    spec: list[str | Axes | None] = [None] * ndim
    if axes[logical_axis]:
        spec[-dimension] = axes[logical_axis]
    if path[0] == "experts" and plan.experts > 1:
        spec[0] = EXPERT
    return PartitionSpec(*spec)


# Logical axis of a leaf, and its dimension counted from the last.
_SPLIT: dict[str, tuple[str, int]] = {
    "q": ("heads", 2), "k": ("heads", 2), "v": ("heads", 2), "o": ("heads", 2),
    "q_bias": ("heads", 1), "k_bias": ("heads", 1), "v_bias": ("heads", 1),
    "sinks": ("heads", 1), "output_gate": ("heads", 2),
    "q_norm": ("norm over heads", 1), "k_norm": ("norm over heads", 1),
    "lm_head": ("vocabulary", 2),
    "gate": ("ffn", 1), "up": ("ffn", 1), "down": ("ffn", 2), "gate_scale": ("ffn", 1), "up_scale": ("ffn", 1),
    "gate_exponents": ("ffn", 1), "up_exponents": ("ffn", 1), "down_exponents": ("ffn", 2),
}  # fmt: skip
_REPLICATED = frozenset(
    {
        "embed", "norm", "input_norm", "post_attention_norm", "attention_output_norm", "mlp_output_norm", "hidden_norm",
        "o_bias", "router", "router_bias", "correction", "shared_gate", "gate_bias", "up_bias", "down_bias",
        "lm_head_bias", "down_scale", "fc", "fc_bias", "fc_norms", "target_ids",
        "previous", "following", "mixer", "mixer_bias", "weight", "bias",
    }
)  # fmt: skip


def with_repeated_heads(config: Config, placement: Placement) -> Config:
    """Repeat each key/value head as often as devices need it; the model computes the same."""
    repeats = repeated_heads(config, placement.sizes, placement.plan)
    return dataclasses.replace(config, num_key_value_heads=config.num_key_value_heads * repeats)


def repeat_heads(array: np.ndarray, rows: int, head_dim: int) -> np.ndarray:
    """Repeat each head of `array` `[heads * head, ...]`, copies next to each other, to `rows` rows."""
    if len(array) == rows:
        return array
    heads = array.reshape(-1, head_dim, *array.shape[1:])
    return np.repeat(heads, rows // len(array), axis=0).reshape(rows, *array.shape[1:])


def place_head(head: Head, config: DraftConfig | DFlashConfig, placement: Placement) -> Head:
    """Shard a loaded head; `config` is that with repeated key/value heads."""
    kv = config.num_key_value_heads * config.head_dim

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        names: Path = tuple(getattr(step, "name", getattr(step, "idx", "")) for step in path)
        array = np.asarray(leaf)
        if names[-1] in ("k", "v", "k_bias", "v_bias"):
            array = repeat_heads(array, kv, config.head_dim)
        return put_global(array, placement.sharding(names, array.shape))

    return dataclasses.replace(jax.tree_util.tree_map_with_path(place, head), sharding=placement.plan)


def place_output(matrix: jax.Array, head: DraftHead | DFlashHead, mesh: Mesh) -> jax.Array:
    """Shard the target's output matrix as that of a head on the same mesh."""
    sharding = NamedSharding(mesh, leaf_spec(head.sharding, False, ("lm_head",), matrix.ndim))
    return jax.jit(lambda whole: whole, out_shardings=sharding)(matrix)
