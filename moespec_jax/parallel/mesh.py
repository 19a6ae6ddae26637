"""Meshes of devices, and the axes over which the parts of a model are sharded.

A program runs on every device of a mesh, on its shards (`jax.shard_map`), and communicates in the functions of
`collectives.py`. The sequences of a batch are sharded over `data`, the experts of every layer over `expert`, and every
expert's ffn dimension over `tensor`. Attention heads, dense MLPs and the output head, which every pass reads, are
sharded over `expert` and `tensor` together where they divide evenly, else over `tensor`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moespec_jax.config import AttentionConfig, DecoderConfig, DraftConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import wrong_type

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")
Axes = tuple[str, ...]
# Width of a TPU's vector registers in numbers: a narrower matrix is padded to it.
LANES = 128


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of a mesh.

    Fields:
        data: shards of a batch.
        expert: shards of the experts of a layer.
        tensor: shards of an expert's ffn dimension.

    Raises:
        ValueError: a number is below 1.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in zip(AXES, self.shape, strict=True):
            if not isinstance(size, Integral):
                raise wrong_type(f"{name} of a mesh", "a whole number", size)
        if min(self.shape) < 1:
            raise ValueError(f"expected a mesh of at least one device along each axis; got {self}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes in the order of `AXES`."""
        return self.data, self.expert, self.tensor

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self.shape, strict=True))


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """Mesh axes over which the parts of a model are sharded; a part without axes is replicated.

    Fields:
        heads: axes of the attention heads, of queries and of keys and values.
        vocabulary: axes of the output head. An embedding is replicated: a look-up does not read all of it.
        ffn: axes of the ffn dimension of dense MLPs and shared experts.
        experts: number of shards of the experts of each layer.
        expert_ffn: axes of the ffn dimension of routed experts; none where they have biases, which would be summed.
    """

    heads: Axes = ()
    vocabulary: Axes = ()
    ffn: Axes = ()
    experts: int = 1
    expert_ffn: Axes = ()

    @property
    def routed(self) -> Axes:
        """Axes over which the outputs of routed experts are summed."""
        return ((EXPERT,) if self.experts > 1 else ()) + self.expert_ffn


REPLICATED = ShardingPlan()


def parse_mesh(text: str) -> MeshConfig:
    """Parse a mesh such as `data=2,expert=4`; axes that are not listed have size 1.

    Raises:
        ValueError: `text` is not such a list.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or not 0 < int(size) <= 2**20:
            raise ValueError(f"expected a mesh as data=1,expert=4,tensor=2, each at most once; got {text!r}")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def best_mesh(config: DecoderConfig, devices: int) -> MeshConfig:
    """Choose a mesh of `devices` devices for one sequence or few.

    `tensor` is the largest size with which each shard of an expert's ffn dimension is a multiple of `LANES`: shards of
    this dimension are read equally by every routing. The remaining devices shard the experts. Where no such mesh also
    shards the attention heads, another one that the model can have is chosen, of the largest model shards.
    """
    for tensor in range(devices, 0, -1):
        mesh = MeshConfig(1, devices // tensor, tensor)
        whole_lanes = tensor == 1 or config.moe_intermediate_size % (LANES * tensor) == 0
        heads_divide = devices == 1 or bool(_heads(config, mesh))
        if devices % tensor == 0 and whole_lanes and config.num_experts % mesh.expert == 0 and heads_divide:
            return mesh
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    meshes = [MeshConfig(d, devices // (d * t), t) for d in sizes for t in sizes if devices % (d * t) == 0]
    return next(mesh for mesh in meshes if _divides(config, mesh))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange the first of `devices` (default: all) as a mesh.

    Raises:
        ValueError: there are too few devices, or one of several processes has no device of the mesh.
    """
    available = jax.devices() if devices is None else list(devices)
    if len(available) < config.devices:
        raise ValueError(f"expected {config.devices} devices for a mesh of {config}; there are {len(available)}")
    if devices is None and len({device.process_index for device in available[: config.devices]}) < jax.process_count():
        raise ValueError(f"expected a mesh with devices of all {jax.process_count()} processes; got {config}")
    return Mesh(np.array(available[: config.devices]).reshape(config.shape), AXES)


def adopt_mesh(mesh: Mesh) -> Mesh:
    """Complete a caller's mesh: its devices in their order, missing axes of `AXES` with size 1, and no others.

    Raises:
        ValueError: it has an axis of another name and more than one device, or one of several processes has no device
            of the mesh.
    """
    sizes = {name: size for name, size in mesh.shape.items() if name in AXES}
    if math.prod(sizes.values()) != mesh.size:
        given = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"expected a mesh with axes among {', '.join(AXES)}, as in Mesh(devices, ('expert', 'tensor'));"
            f" got one of {given}"
        )
    if len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        raise ValueError(f"expected a mesh with devices of all {jax.process_count()} processes; got {mesh.shape}")
    sizes |= {name: 1 for name in AXES if name not in sizes}
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes))


def shard_decoder(config: DecoderConfig, mesh: MeshConfig) -> ShardingPlan:
    """Plan the sharding of a decoder on a mesh.

    Raises:
        ValueError: its experts do not divide evenly over `expert`, or its heads over `tensor`.
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
    divides = mesh.tensor > 1 and config.moe_intermediate_size % mesh.tensor == 0
    return ShardingPlan(
        heads=heads,
        vocabulary=_most_shards(mesh, config.vocab_size),
        ffn=_most_shards(mesh, *dense),
        experts=mesh.expert,
        expert_ffn=(TENSOR,) if divides and not config.expert_bias else (),
    )


def _divides(config: DecoderConfig, mesh: MeshConfig) -> bool:
    """Test whether a decoder can be sharded on a mesh; it can on one of the axis `data` alone."""
    try:
        shard_decoder(config, mesh)
    except ValueError:
        return False
    return True


def shard_head(config: DraftConfig | DFlashConfig, mesh: MeshConfig) -> ShardingPlan:
    """Plan the sharding of a draft head on a mesh: each part over `expert` and `tensor` where it divides evenly, since
    a round reads the head once for every level of the tree."""
    return ShardingPlan(
        heads=_heads(config, mesh),
        vocabulary=_most_shards(mesh, config.draft_vocab_size),
        ffn=_most_shards(mesh, config.intermediate_size),
    )


def ways(mesh: MeshConfig, axes: Axes) -> int:
    """Compute the number of shards of a dimension that is sharded over `axes`."""
    return math.prod(getattr(mesh, axis) for axis in axes)


def repeated_heads(config: AttentionConfig, mesh: MeshConfig, plan: ShardingPlan) -> int:
    """Compute how many devices have a copy of each key/value head: more than one where there are more shards than
    key/value heads, as every device needs those of its query heads."""
    return max(ways(mesh, plan.heads) // config.num_key_value_heads, 1)


def _heads(config: AttentionConfig, mesh: MeshConfig) -> Axes:
    """Choose the axes of the attention heads: key/value heads divide evenly, or are repeated evenly."""

    def divides(shards: int) -> bool:
        kv = config.num_key_value_heads
        counts = (config.num_attention_heads, *(config.layer_heads if isinstance(config, DecoderConfig) else ()))
        return not any(count % shards for count in counts) and (kv % shards == 0 or shards % kv == 0)

    return _first(mesh, divides)


def _most_shards(mesh: MeshConfig, *sizes: int) -> Axes:
    """Choose the axes over which dimensions of all these sizes divide evenly."""
    return _first(mesh, lambda shards: all(size % shards == 0 for size in sizes))


def _first(mesh: MeshConfig, divides: Callable[[int], bool]) -> Axes:
    """Choose the first of (expert, tensor) and (tensor) that has more than one shard and `divides`; else no axes."""
    for axes in ((EXPERT, TENSOR), (TENSOR,)):
        if ways(mesh, axes) > 1 and divides(ways(mesh, axes)):
            return axes
    return ()
