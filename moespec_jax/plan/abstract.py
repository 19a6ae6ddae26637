"""Trees of abstract arrays (`jax.ShapeDtypeStruct`): their shardings, and decoders of fewer layers."""

import dataclasses
from typing import Any

import jax

from moespec_jax.config import DecoderConfig


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
