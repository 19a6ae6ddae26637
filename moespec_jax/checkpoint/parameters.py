"""Leaves of a decoder's parameters: their shapes in a back-end's layout, the place of each published tensor, and the
`Decoder` built of them. Loading, random models and ahead-of-time compilation share this description."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moespec_jax.checkpoint.placement import Placement
from moespec_jax.checkpoint.tensor_table import Path, Tensor, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import RequestError
from moespec_jax.nn.attention import Attention
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.decoder import Decoder, layer_runs
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.layer_blocks import Layer
from moespec_jax.nn.layers import GatedMlp, LayerNorm
from moespec_jax.nn.moe import SparseMlp
from moespec_jax.nn.quantization import FORMS, Part, Quantization
from moespec_jax.parallel.mesh import REPLICATED, ShardingPlan, ways

# Matrices of a routed expert, and their biases.
MATRICES = ("gate", "up", "down")
BIASES = tuple(f"{name}_bias" for name in MATRICES)
# Numbers of a random leaf that are drawn at once: drawing takes several times their memory.
LARGE = 1 << 27


class Place(NamedTuple):
    """Place of a tensor.

    Fields:
        leaf: path of the leaf.
        row: its row, where the leaf stacks several tensors.
    """

    leaf: Path
    row: int | None = None


def place_of(config: DecoderConfig, backend: Backend, path: Path, plan: ShardingPlan = REPLICATED) -> Place:
    """Locate the tensor at `path` of the tensor table in a back-end's layout. Where experts are sharded, the rows of a
    shard are contiguous: each shard is a `Flat` of its own on the devices that hold it."""
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
    config: DecoderConfig,
    backend: Backend,
    quantization: Quantization | None = None,
    table: Mapping[str, Tensor] | None = None,
) -> dict[Path, tuple[int, ...]]:
    """Compute the shape of every leaf in a back-end's layout. `table` is that of `config` (default: it is made)."""
    rows: dict[Path, int] = {}
    shapes: dict[Path, tuple[int, ...]] = {}
    for tensor in (tensor_table(config) if table is None else table).values():
        for path, shape in part_shapes(tensor, quantization).items():
            place = place_of(config, backend, path)
            shapes[place.leaf] = shape
            if place.row is not None:
                rows[place.leaf] = max(rows.get(place.leaf, 0), place.row + 1)
    return {leaf: (rows[leaf], *shape) if leaf in rows else shape for leaf, shape in shapes.items()}


def part_shapes(tensor: Tensor, quantization: Quantization | None) -> dict[Path, tuple[int, ...]]:
    """Compute the shape of every array that a tensor of the table is kept as: one, or the parts of a quantized
    matrix."""
    shape = final_shape(tensor)
    if quantization is None or not is_quantized(tensor.path):
        return {tensor.path: shape}
    rows, columns = shape
    return {
        part_path(tensor.path, part): (rows // part.inputs if part.inputs else 1, columns)
        for part in FORMS[quantization].parts
    }


def check_blocks(config: DecoderConfig, quantization: Quantization | None, placement: Placement | None) -> None:
    """Refuse experts whose inputs are not whole blocks of a quantization, on every device of a mesh.

    Raises:
        RequestError: the hidden size, or the width of an expert on one device, is not a multiple of a block.
    """
    if quantization is None:
        return
    block = max(part.inputs for part in FORMS[quantization].parts)
    shards = 1 if placement is None else ways(placement.sizes, placement.plan.expert_ffn)
    sizes = (config.hidden_size, config.moe_intermediate_size // shards)
    if config.num_sparse_layers and any(size % block for size in sizes):
        raise RequestError(
            f"expected experts whose sizes are multiples of {block} for {quantization}; got {sizes[0]} x {sizes[1]}"
            f"{' on each device' if shards > 1 else ''}"
        )


def is_quantized(path: Path) -> bool:
    """Test whether a `quantization` quantizes the tensor at `path` of the tensor table: the matrices of routed experts
    are."""
    return path[0] == "experts" and path[-1] in MATRICES


def part_path(path: Path, part: Part) -> Path:
    """Path of a part of the quantized matrix at `path`."""
    return (*path[:-1], f"{path[-1]}{part.suffix}")


def leaf_dtype(config: DecoderConfig, path: Path, dtype: DTypeLike, quantization: Quantization | None) -> jnp.dtype:
    """Dtype of a leaf of parameters in `dtype`."""
    name = str(path[-1])
    if quantization is not None and path[0] == "experts":
        kinds = {kind + part.suffix: part.dtype for kind in MATRICES for part in FORMS[quantization].parts}
        return jnp.dtype(kinds.get(name, dtype))
    if name == "correction" or (name == "router" and config.router.float32):
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def final_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of one tensor in kept orientation."""
    return tensor.shape[::-1] if tensor.transpose else tensor.shape


def build_decoder(
    config: DecoderConfig, backend: Backend, leaves: Mapping[Path, Any], plan: ShardingPlan = REPLICATED
) -> Decoder:
    """Build parameters of their leaves (arrays, or abstract shapes)."""
    starts = [run.start for run in layer_runs(config)] if backend.stacked else range(config.num_hidden_layers)
    layers = tuple(_build_layer(config.sparse_layers[start], ("layers", i), leaves) for i, start in enumerate(starts))
    return Decoder(
        embed=leaves[("embed",)],
        layers=layers,
        experts=_build_experts(config, backend, leaves, plan),
        norm=_build_norm(("norm",), leaves),
        lm_head=leaves.get(("lm_head",)),
        lm_head_bias=leaves.get(("lm_head_bias",)),
        stacked=backend.stacked,
        sharding=plan,
        logits_scaling=config.logits_scaling,
    )


def abstract_decoder(
    config: DecoderConfig,
    backend: Backend,
    dtype: DTypeLike,
    where: jax.sharding.Sharding | Placement | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """Build abstract parameters, of `jax.ShapeDtypeStruct`, with one sharding for all leaves or those of a mesh.

    Raises:
        RequestError: as `check_blocks`.
    """
    check_blocks(config, quantization, where if isinstance(where, Placement) else None)

    def leaf(path: Path, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = where.sharding(path, shape) if isinstance(where, Placement) else where
        return jax.ShapeDtypeStruct(shape, leaf_dtype(config, path, dtype, quantization), sharding=sharding)

    leaves = {path: leaf(path, shape) for path, shape in leaf_shapes(config, backend, quantization).items()}
    return build_decoder(config, backend, leaves, where.plan if isinstance(where, Placement) else REPLICATED)


def random_decoder(config: DecoderConfig, backend: Backend, key: jax.Array, dtype: DTypeLike) -> Decoder:
    """Draw random parameters for timing and tests: norms are 1, biases small, matrices of unit gain."""
    shapes = leaf_shapes(config, backend)
    keys = jax.random.split(key, len(shapes))
    leaves = {
        path: _random_leaf(path, shape, k, leaf_dtype(config, path, dtype, None))
        for (path, shape), k in zip(shapes.items(), keys, strict=True)
    }
    return build_decoder(config, backend, leaves)


def _build_layer(sparse: bool, path: Path, leaves: Mapping[Path, Any]) -> Layer:
    def at(*rest: str) -> Any:
        return leaves.get((*path, *rest))

    attention = Attention(**{name: at("attention", name) for name in Attention.__dataclass_fields__})
    if sparse:
        shared = _build_mlp((*path, "mlp", "shared"), leaves) if at("mlp", "shared", "gate") is not None else None
        names = ("router", "router_bias", "correction", "shared_gate")
        mlp = SparseMlp(shared=shared, **{name: at("mlp", name) for name in names})
    else:
        mlp = _build_mlp((*path, "mlp"), leaves)
    names = ("input_norm", "post_attention_norm", "attention_output_norm", "mlp_output_norm")
    return Layer(attention=attention, mlp=mlp, **{name: _build_norm((*path, name), leaves) for name in names})


def _build_norm(path: Path, leaves: Mapping[Path, Any]) -> Any:
    """Build the norm at `path`; None where there is none."""
    weight = leaves.get((*path, "weight"))
    return leaves.get(path) if weight is None else LayerNorm(weight, leaves[(*path, "bias")])


def _build_mlp(path: Path, leaves: Mapping[Path, Any]) -> GatedMlp:
    return GatedMlp(**_matrices(leaves, path))


def _build_experts(config: DecoderConfig, backend: Backend, leaves: Mapping[Path, Any], plan: ShardingPlan) -> object:
    if config.num_sparse_layers == 0:
        return ()
    if backend.layout == "flat":
        held = config.num_experts // plan.experts
        return Flat(**_matrices(leaves, ("experts",)), num_experts=held)
    layers, experts = range(config.num_sparse_layers), range(config.num_experts)
    return tuple(tuple(_build_mlp(("experts", layer, e), leaves) for e in experts) for layer in layers)


def _matrices(leaves: Mapping[Path, Any], path: Path) -> dict[str, Any]:
    """Matrices at `path`, and their biases, None where there are none."""
    biases = {name: leaves.get((*path, name)) for name in BIASES}
    return {name: _matrix(leaves, (*path, name)) for name in MATRICES} | biases


def _matrix(leaves: Mapping[Path, Any], path: Path) -> Any:
    for form in FORMS.values():
        parts = [leaves.get(part_path(path, part)) for part in form.parts]
        if all(part is not None for part in parts):
            return form.kind(*parts)
    return leaves[path]


def _random_leaf(path: Path, shape: tuple[int, ...], key: jax.Array, dtype: DTypeLike) -> jax.Array:
    name = str(path[-1])
    if name.endswith("norm") or name == "weight":
        return jnp.ones(shape, dtype)
    by_row = ("q", "k", "v", "embed", "lm_head", "router", "shared_gate", "output_gate")
    fan_in = shape[-1] if name in by_row else shape[-2:][0]
    scale = 0.1 if name.endswith("bias") or name in ("sinks", "correction") else fan_in**-0.5
    if math.prod(shape) < LARGE:
        return jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(scale, dtype)
    return random_rows(key, shape, dtype, scale)


@partial(jax.jit, static_argnums=(1, 2, 3))
def random_rows(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, scale: float) -> jax.Array:
    """Draw a normal array row by row along its first axis, in the memory of the array and of one row."""

    def row(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape[1:], jnp.dtype(dtype)) * jnp.asarray(scale, dtype)

    return jax.lax.map(row, jax.random.split(key, shape[0]))
