"""The parameters' leaves: their shapes under a back-end's layout, the place of each published tensor in them, and how
they come together as a `Decoder`. One description serves loading, random models and ahead-of-time compilation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moespec_jax.checkpoint.placement import Placement
from moespec_jax.checkpoint.tensor_table import Path, Tensor, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import Attention
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder, Layer, layer_runs
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.moe import SparseMlp
from moespec_jax.nn.quantization import Quantization, Quantized
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan


class Place(NamedTuple):
    """The leaf a tensor belongs to, and its row there where the leaf stacks several tensors."""

    leaf: Path
    row: int | None = None


def place_of(config: DecoderConfig, backend: Backend, path: Path, plan: ShardingPlan = REPLICATED) -> Place:
    """Where the tensor at `path` of the tensor table lies under this back-end. Where experts are in shards, the rows of
    a shard lie together, for each of them is a `Flat` of its own on the devices that hold it."""
    if path[0] == "experts" and backend.layout == "flat":
        _, layer, expert, name = path
        assert isinstance(layer, int) and isinstance(expert, int)
        held = config.num_experts // plan.experts
        shard, within = divmod(expert, held)
        return Place(("experts", name), (shard * config.num_sparse_layers + layer) * held + within)
    if path[0] == "layers" and backend.stacked:
        _, layer, *rest = path
        assert isinstance(layer, int)
        for number, run in enumerate(layer_runs(config)):
            if layer in run:
                return Place(("layers", number, *rest), layer - run.start)
    return Place(path)


def leaf_shapes(
    config: DecoderConfig, backend: Backend, quantization: Quantization | None = None
) -> dict[Path, tuple[int, ...]]:
    """Shape of every leaf of the parameters under this back-end."""
    rows: dict[Path, int] = {}
    shapes: dict[Path, tuple[int, ...]] = {}
    for tensor in tensor_table(config).values():
        parts = {tensor.path: final_shape(tensor)}
        if is_quantized(tensor.path, quantization):
            parts[scale_of(tensor.path)] = (1, final_shape(tensor)[-1])
        for path, shape in parts.items():
            place = place_of(config, backend, path)
            shapes[place.leaf] = shape
            if place.row is not None:
                rows[place.leaf] = max(rows.get(place.leaf, 0), place.row + 1)
    return {leaf: (rows[leaf], *shape) if leaf in rows else shape for leaf, shape in shapes.items()}


def is_quantized(path: Path, quantization: Quantization | None) -> bool:
    """Whether the tensor at `path` of the tensor table is kept quantized: routed experts are."""
    return quantization is not None and path[0] == "experts"


def scale_of(path: Path) -> Path:
    """Where the steps of a quantized matrix's output channels are."""
    return (*path[:-1], f"{path[-1]}_scale")


def leaf_dtype(path: Path, dtype: DTypeLike, quantization: Quantization | None) -> jnp.dtype:
    """What a leaf is kept in, of parameters in `dtype`."""
    if str(path[-1]).endswith("_scale"):
        return jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.int8 if is_quantized(path, quantization) else dtype)


def final_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of one tensor as it is kept, which may be the transpose of the published one."""
    return tensor.shape[::-1] if tensor.transpose else tensor.shape


def build_decoder(
    config: DecoderConfig, backend: Backend, leaves: Mapping[Path, Any], plan: ShardingPlan = REPLICATED
) -> Decoder:
    """The parameters made of their leaves (arrays, or abstract shapes)."""
    starts = [run.start for run in layer_runs(config)] if backend.stacked else range(config.num_hidden_layers)
    layers = tuple(_build_layer(config.sparse_layers[start], ("layers", i), leaves) for i, start in enumerate(starts))
    return Decoder(
        embed=leaves[("embed",)],
        layers=layers,
        experts=_build_experts(config, backend, leaves, plan),
        norm=leaves[("norm",)],
        lm_head=leaves.get(("lm_head",)),
        stacked=backend.stacked,
        sharding=plan,
    )


def abstract_decoder(
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    where: jax.sharding.Sharding | Placement | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """Shapes and dtypes of the parameters without any memory behind them, all on one sharding or spread over a mesh."""

    def leaf(path: Path, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = where.sharding(path, shape) if isinstance(where, Placement) else where
        return jax.ShapeDtypeStruct(shape, leaf_dtype(path, dtype, quantization), sharding=sharding)

    leaves = {path: leaf(path, shape) for path, shape in leaf_shapes(config, backend, quantization).items()}
    return build_decoder(config, backend, leaves, where.plan if isinstance(where, Placement) else REPLICATED)


def random_decoder(config: DecoderConfig, backend: Backend, key: jax.Array, dtype: DTypeLike) -> Decoder:
    """Random parameters of the right scale for timing and tests: norms 1, biases small, matrices of unit gain."""
    shapes = leaf_shapes(config, backend)
    keys = jax.random.split(key, len(shapes))
    leaves = {path: _random_leaf(path, shape, k, dtype) for (path, shape), k in zip(shapes.items(), keys, strict=True)}
    return build_decoder(config, backend, leaves)


def _build_layer(sparse: bool, path: Path, leaves: Mapping[Path, Any]) -> Layer:
    def at(*rest: str) -> Any:
        return leaves.get((*path, *rest))

    attention = Attention(**{name: at("attention", name) for name in Attention.__dataclass_fields__})
    if sparse:
        shared = _build_mlp((*path, "mlp", "shared"), leaves) if at("mlp", "shared", "gate") is not None else None
        mlp = SparseMlp(router=at("mlp", "router"), shared=shared, shared_gate=at("mlp", "shared_gate"))
    else:
        mlp = _build_mlp((*path, "mlp"), leaves)
    return Layer(at("input_norm"), attention, at("post_attention_norm"), mlp)


def _build_mlp(path: Path, leaves: Mapping[Path, Any]) -> GatedMlp:
    return GatedMlp(*(_matrix(leaves, (*path, name)) for name in ("gate", "up", "down")))


def _build_experts(config: DecoderConfig, backend: Backend, leaves: Mapping[Path, Any], plan: ShardingPlan) -> object:
    if config.num_sparse_layers == 0:
        return ()
    if backend.layout == "flat":
        held = config.num_experts // plan.experts
        return Flat(*(_matrix(leaves, ("experts", name)) for name in ("gate", "up", "down")), num_experts=held)
    layers, experts = range(config.num_sparse_layers), range(config.num_experts)
    return tuple(tuple(_build_mlp(("experts", layer, e), leaves) for e in experts) for layer in layers)


def _matrix(leaves: Mapping[Path, Any], path: Path) -> Any:
    scale = leaves.get(scale_of(path))
    return leaves[path] if scale is None else Quantized(leaves[path], scale)


def _random_leaf(path: Path, shape: tuple[int, ...], key: jax.Array, dtype: DTypeLike) -> jax.Array:
    name = str(path[-1])
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    fan_in = shape[-1] if name in ("q", "k", "v", "embed", "lm_head", "router", "shared_gate") else shape[-2:][0]
    scale = 0.1 if name.endswith("bias") else fan_in**-0.5
    return jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(scale, dtype)
