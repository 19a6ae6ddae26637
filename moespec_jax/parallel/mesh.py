"""Meshes of devices: how many in each direction, what of a model is split over which, and what crosses between them.

A program runs on every device of a mesh at once, on its share of everything (`jax.shard_map`), and exchanges in the
few places that call the functions at the end of this file. `data` splits the sequences of a batch; `expert` the experts
of every layer; `tensor` every expert's ffn dimension. Attention heads, dense MLPs and the output head are split over
`expert` and `tensor` together where they can be, for each device reads its share of them in every pass.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moespec_jax.config import AttentionConfig, DecoderConfig, DraftConfig

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")
Axes = tuple[str, ...]
# How many numbers a TPU keeps side by side: a narrower matrix is padded to it.
LANES = 128


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices there are in each direction of a mesh.

    Raises:
        ValueError: a number is below 1.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"expected a mesh of at least one device in each direction; got {self}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """In the order of `AXES`."""
        return self.data, self.expert, self.tensor

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self.shape, strict=True))


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """Over which axes of a mesh the parts of some parameters are split; without any, they are whole on every device.

    `heads` is about attention, queries and keys alike; `vocabulary` about the output head (an embedding is whole on
    every device: its rows are looked up, not read); `ffn` about dense MLPs and shared experts. Each layer's experts are
    in `experts` shards, and each expert's ffn dimension is split over `expert_ffn`.
    """

    heads: Axes = ()
    vocabulary: Axes = ()
    ffn: Axes = ()
    experts: int = 1
    expert_ffn: Axes = ()

    @property
    def routed(self) -> Axes:
        """Over which axes the outputs of routed experts are summed."""
        return ((EXPERT,) if self.experts > 1 else ()) + self.expert_ffn


REPLICATED = ShardingPlan()


def parse_mesh(text: str) -> MeshConfig:
    """`data=2,expert=4`: what is not named is 1.

    Raises:
        ValueError: it is not such a list.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or not 0 < int(size) <= 2**20:
            raise ValueError(f"expected a mesh as data=1,expert=4,tensor=2, each at most once; got {text!r}")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def best_mesh(config: DecoderConfig, devices: int) -> MeshConfig:
    """A mesh of that many devices for one sequence or few: as many as can share every expert's width, for they read
    alike whatever is routed, as long as each has whole lanes of it; the others share the experts.

    Raises:
        ValueError: the model cannot be split so many ways.
    """
    for tensor in range(devices, 0, -1):
        mesh = MeshConfig(1, devices // tensor, tensor)
        whole = tensor == 1 or config.moe_intermediate_size % (LANES * tensor) == 0
        shared = devices == 1 or bool(_heads(config, mesh))
        if devices % tensor == 0 and whole and config.num_experts % mesh.expert == 0 and shared:
            return mesh
    raise ValueError(f"expected a number of devices that share the model's heads and experts evenly; got {devices}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The first devices there are, or those given, as a mesh.

    Raises:
        ValueError: there are too few, or one of several processes has none of them.
    """
    there = jax.devices() if devices is None else list(devices)
    if len(there) < config.devices:
        raise ValueError(f"expected {config.devices} devices for a mesh of {config}; there are {len(there)}")
    if devices is None and len({device.process_index for device in there[: config.devices]}) < jax.process_count():
        raise ValueError(f"expected a mesh with devices of all {jax.process_count()} processes; got {config}")
    return Mesh(np.array(there[: config.devices]).reshape(config.shape), AXES)


def shard_decoder(config: DecoderConfig, mesh: MeshConfig) -> ShardingPlan:
    """How a decoder lies on a mesh.

    Raises:
        ValueError: its experts or its heads cannot be split so many ways.
    """
    if config.num_experts % mesh.expert:
        raise ValueError(f"expected expert= to divide the model's {config.num_experts} experts; got {mesh.expert}")
    heads = _heads(config, mesh)
    if mesh.tensor > 1 and not heads:
        raise ValueError(
            f"expected tensor= to divide the model's {config.num_attention_heads} attention heads, and to divide its"
            f" {config.num_key_value_heads} key/value heads or be a multiple of them; got {mesh.tensor}"
        )
    dense = [config.shared_expert_intermediate_size, *(() if all(config.sparse_layers) else [config.intermediate_size])]
    return ShardingPlan(
        heads=heads,
        vocabulary=_widest(mesh, config.vocab_size),
        ffn=_widest(mesh, *dense),
        experts=mesh.expert,
        expert_ffn=(TENSOR,) if mesh.tensor > 1 and config.moe_intermediate_size % mesh.tensor == 0 else (),
    )


def shard_head(config: DraftConfig, mesh: MeshConfig) -> ShardingPlan:
    """How a draft head lies on a mesh: as much of it as can be over all devices that share a sequence. It is read once
    for every level of a tree."""
    return ShardingPlan(
        heads=_heads(config, mesh),
        vocabulary=_widest(mesh, config.draft_vocab_size),
        ffn=_widest(mesh, config.intermediate_size),
    )


def ways(mesh: MeshConfig, axes: Axes) -> int:
    """In how many parts these axes split something."""
    return math.prod(getattr(mesh, axis) for axis in axes)


def repeated_heads(config: AttentionConfig, mesh: MeshConfig, plan: ShardingPlan) -> int:
    """How many times each key/value head is kept, so that every device has those that its queries share."""
    return max(ways(mesh, plan.heads) // config.num_key_value_heads, 1)


def _heads(config: AttentionConfig, mesh: MeshConfig) -> Axes:
    def fits(count: int) -> bool:
        kv = config.num_key_value_heads
        return config.num_attention_heads % count == 0 and (kv % count == 0 or count % kv == 0)

    return _first(mesh, fits)


def _widest(mesh: MeshConfig, *sizes: int) -> Axes:
    return _first(mesh, lambda count: all(size % count == 0 for size in sizes))


def _first(mesh: MeshConfig, fits: Any) -> Axes:
    """The axes that split into most parts and fit; none where there is nothing to split."""
    for axes in ((EXPERT, TENSOR), (TENSOR,)):
        if ways(mesh, axes) > 1 and fits(ways(mesh, axes)):
            return axes
    return ()
