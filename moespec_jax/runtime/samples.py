"""Samples of a prompt: it is read once, and its rows of the state after it are repeated along the batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moespec_jax.decoding.method import Prefill
from moespec_jax.errors import RequestError
from moespec_jax.parallel.mesh import DATA

PrefillState = TypeVar("PrefillState")
Prompt = TypeVar("Prompt")


def with_samples(prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """Repeat every prompt once for each of its samples, which follow each other.

    Raises:
        RequestError: there is to be no sample.
    """
    if samples < 1:
        raise RequestError(f"expected samples of at least 1, got {samples}")
    return [prompt for prompt in prompts for _ in range(samples)]


def rows_of_one_read(batch: int, samples: int, mesh: Mesh | None) -> int:
    """Compute how many sequences of the batch share a row of prefill: all samples of a prompt or, on a mesh, as many of
    them as leave every device of the `data` axis the same number of rows; 1 where no number does."""
    shards = 1 if mesh is None else mesh.shape[DATA]
    shared = (count for count in range(samples, 1, -1) if samples % count == 0 and (batch // count) % shards == 0)
    return next(shared, 1)


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Settings of `repeat_rows`: what the state is of, and how many sequences each of its rows becomes."""

    prefill: Prefill[Any, Any]
    count: int


def repeat_rows(settings: Repetition, params: Any, state: PrefillState) -> PrefillState:
    """Repeat every sequence of a state of prefill, in succession; its sharding names the axis of the batch."""

    def repeated(spec: PartitionSpec, part: Any) -> Any:
        if DATA not in spec:
            return part
        axis = tuple(spec).index(DATA)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, settings.count, axis=axis), part)

    specs = settings.prefill.specs(params)
    return jax.tree.map(repeated, specs, state, is_leaf=lambda node: isinstance(node, PartitionSpec))
