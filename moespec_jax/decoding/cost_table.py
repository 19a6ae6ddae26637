"""Costs of the rounds of a menu as a value, in place of costs that are measured in the first runs."""

import dataclasses
from typing import Any

from moespec_jax.config import TreeConfig


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Measured costs and gains of rounds of plain decoding, shape 0, and of some trees.

    Fields:
        trees: the other shapes.
        seconds: of a round, for each shape and measurement.
        tokens: that a sequence gained in a round, likewise.
        source: file that holds them.
        identity: model, device, batch and other settings that they were measured with.
    """

    trees: tuple[TreeConfig, ...]
    seconds: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[float, ...], ...]
    source: str
    identity: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
