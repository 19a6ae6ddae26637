"""Trees of abstract arrays (`jax.ShapeDtypeStruct`): their shardings, and decoders of fewer layers."""

import dataclasses
from typing import Any

import jax

from moespec_jax.config import DecoderConfig
from moespec_jax.measure.local_bytes import local_size


def placed(tree: Any, sharding: Any) -> Any:
    """Set the sharding of every leaf of an abstract tree: one for all, or a tree of shardings."""
    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, sharding)


def with_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    """Truncate a decoder to its first `layers` layers."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kept = {name: value[:layers] for name, value in values.items() if isinstance(value, tuple)}
    return dataclasses.replace(config, num_hidden_layers=layers, **kept)


def copyable_sizes(config: DecoderConfig, tree: Any) -> set[tuple[str, int]]:
    """List types and element counts by which `tpu_hlo.large_values` finds copies of weights and caches: those of the
    tree's leaves on one device, whole, of one layer, and of one expert."""
    parts = [1, max(config.num_hidden_layers, 1), max(config.num_sparse_layers * config.num_experts, 1)]
    return {("bf16", local_size(leaf) // part) for leaf in jax.tree.leaves(tree) for part in parts}
