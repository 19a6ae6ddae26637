"""Measurements of decoding rounds: one round in full, and sums over the rounds of a call. Collected on the device."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.decoder import ForwardInfo
from moespec_jax.parallel.collectives import data_axes, pmax, psum


class BudgetInfo(NamedTuple):
    """An expert budget in one verification.

    Fields:
        shortlist: expert ids of every sparse layer, best first; `num_experts` in unused slots.
        mass_kept: the shortlist's share of the scores of all experts.
        replaced: share of rows, over layers, that lost an expert of their own.
    """

    shortlist: Int[Array, "layers slots"]
    mass_kept: Float[Array, " layers"]
    replaced: Float[Array, ""]


class RoundShape(NamedTuple):
    """Shape of a round, and what the costs by which it was chosen predicted.

    Fields:
        tree: size, depth and top-k (`60/7/10`); None in a plain round.
        seconds: of the round; None where no costs decided.
        tokens: that a sequence gains in it, likewise.
    """

    tree: str | None
    seconds: float | None = None
    tokens: float | None = None


class RoundInfo(NamedTuple):
    """One round of all sequences.

    Fields:
        active: sequences that took part.
        selected: experts that any row of a sequence selected.
        read: experts that any row of a sequence used, which a budget limits.
        tree: draft trees; None in plain decoding.
        accepted: accepted paths; None in plain decoding.
        budget: None without a budget.
        expected: tokens that a round of its shape was expected to gain, where every round chooses its shape.
        shape: of the tree; known on the host, to those that a round is reported to.
    """

    active: Bool[Array, " batch"]
    selected: Bool[Array, "layers batch experts"]
    read: Bool[Array, "layers batch experts"]
    tree: Tree | None = None
    accepted: Accepted | None = None
    budget: BudgetInfo | None = None
    expected: Float[Array, ""] | None = None
    shape: RoundShape | None = None


class BudgetSums(NamedTuple):
    """Sums over rounds of speculative decoding; without a budget, everything is read and kept.

    Fields:
        experts_read: distinct experts that a layer read, mean over sparse layers.
        mass_kept: the shortlists' share of the scores, mean over sparse layers.
        replaced: share of rows that lost an expert of their own.
    """

    experts_read: Float[Array, ""]
    mass_kept: Float[Array, ""]
    replaced: Float[Array, ""]


class RunInfo(NamedTuple):
    """Sums over the rounds of one call.

    Fields:
        rounds: number of rounds, which is that of the target's forward passes.
        active: rounds that each sequence took part in.
        experts_wanted: sum of the distinct experts that a layer's rows selected, mean over sparse layers.
        experts_max_per_device: the same of the most that one device read.
        accepted: rounds of a sequence that committed a node of depth 1, 2, ...; None in plain decoding.
        budget: None in plain decoding.
        last: the last round; None in plain decoding.
    """

    rounds: Int[Array, ""]
    active: Int[Array, " batch"]
    experts_wanted: Float[Array, ""]
    experts_max_per_device: Float[Array, ""]
    accepted: Int[Array, "batch depths"] | None = None
    budget: BudgetSums | None = None
    last: RoundInfo | None = None


def plain_round_info(config: DecoderConfig, active: Bool[Array, " batch"], info: ForwardInfo) -> RoundInfo:
    """Measure a round of plain decoding by its forward pass."""
    selected = experts_wanted(config, info, active.shape[0])
    return RoundInfo(active, selected, selected)


def tree_round_info(
    config: DecoderConfig, active: Bool[Array, " batch"], tree: Tree, accepted: Accepted, info: ForwardInfo
) -> RoundInfo:
    """Measure a round of speculative decoding by its verification."""
    batch = active.shape[0]
    selected = experts_wanted(config, info, batch)
    restricted = [router.restricted for router in info.routers if router.restricted is not None]
    if not restricted:
        return RoundInfo(active, selected, selected, tree, accepted)
    rows = psum(jnp.sum(active, dtype=jnp.float32) * tree.tokens.shape[1], data_axes())
    # Of all layers at once: a sum for each would be a launch for each.
    replaced = jnp.sum(jnp.stack([layer.replaced for layer in restricted]), dtype=jnp.float32) / len(restricted)
    replaced = psum(replaced, data_axes())
    budget = BudgetInfo(
        jnp.stack([layer.shortlist for layer in restricted]),
        jnp.stack([layer.mass_kept for layer in restricted]),
        replaced / jnp.maximum(rows, 1.0),
    )
    return RoundInfo(active, selected, experts_read(config, info, batch), tree, accepted, budget)


def no_plain_rounds(batch: int) -> RunInfo:
    """Start the sums of plain decoding."""
    zero = jnp.float32(0.0)
    return RunInfo(jnp.int32(0), jnp.zeros((batch,), jnp.int32), zero, zero)


def no_tree_rounds(config: DecoderConfig, size: int, path: int, budget: BudgetConfig | None, batch: int) -> RunInfo:
    """Start the sums of speculative decoding by trees of `size` nodes, `path` of them on a path; the last round is a
    placeholder of the right shapes.

    The sums of a budget are carried without one, too: XLA:TPU places the values of a loop with fewer of them worse.
    """
    shape, layers = (batch, size), config.num_sparse_layers
    nodes = Tree(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    count, zero = jnp.zeros((batch,), jnp.int32), jnp.float32(0.0)
    selected = jnp.zeros((layers, batch, config.num_experts), bool)
    accepted = Accepted(jnp.zeros((batch, path), jnp.int32), count, count)
    last_budget, sums = None, BudgetSums(zero, zero, zero)
    if budget is not None and layers:
        shortlist = jnp.zeros((layers, budget.slots), jnp.int32)
        last_budget = BudgetInfo(shortlist, jnp.zeros((layers,), jnp.float32), zero)
    last = RoundInfo(count > 0, selected, selected, nodes, accepted, last_budget)
    by_depth = jnp.zeros((batch, path - 1), jnp.int32)
    return RunInfo(jnp.int32(0), count, zero, zero, by_depth, sums, last)


def add_round(info: RunInfo, last: RoundInfo, shards: int) -> RunInfo:
    """Add one round to the sums; a layer's experts are in `shards` shards."""
    accepted, budget = info.accepted, info.budget
    if accepted is not None and last.accepted is not None:
        accepted = accepted + committed_depths(last.accepted, last.active)[:, 1:].astype(jnp.int32)
    if budget is not None:
        kept, replaced = jnp.float32(1.0), jnp.float32(0.0)
        if last.budget is not None:
            kept, replaced = jnp.mean(last.budget.mass_kept), last.budget.replaced
        read = budget.experts_read + mean_distinct_experts(last.read)
        budget = BudgetSums(read, budget.mass_kept + kept, budget.replaced + replaced)
    return RunInfo(
        info.rounds + 1,
        info.active + last.active.astype(jnp.int32),
        info.experts_wanted + mean_distinct_experts(last.selected),
        info.experts_max_per_device + mean_experts_max_per_device(last.read, shards),
        accepted,
        budget,
        None if info.last is None else last,
    )


def committed_depths(accepted: Accepted, active: Bool[Array, " batch"]) -> Bool[Array, "batch path"]:
    """Mark the depths (0 is the root's) of which each active sequence committed a node."""
    depth = jnp.arange(accepted.path.shape[1], dtype=jnp.int32)[None, :]
    return (depth < accepted.count[:, None]) & active[:, None]


def experts_wanted(config: DecoderConfig, info: ForwardInfo, batch: int) -> Bool[Array, "layers batch experts"]:
    """Mark the experts that any row of a sequence selected, in every sparse layer."""
    return _any_row(config, [router.experts for router in info.routers], batch)


def experts_read(config: DecoderConfig, info: ForwardInfo, batch: int) -> Bool[Array, "layers batch experts"]:
    """Mark the experts that any row of a sequence used, in every sparse layer: the selected ones, or a budget's."""
    routed = [r.experts if r.restricted is None else r.restricted.routing.experts for r in info.routers]
    return _any_row(config, routed, batch)


def mean_distinct_experts(selected: Bool[Array, "layers batch experts"]) -> Float[Array, ""]:
    """Count distinct experts of the whole batch, mean over sparse layers; 0 without any."""
    return jnp.sum(pmax(jnp.any(selected, axis=1), data_axes()), dtype=jnp.float32) / max(selected.shape[0], 1)


def mean_experts_max_per_device(selected: Bool[Array, "layers batch experts"], shards: int) -> Float[Array, ""]:
    """Count the most distinct experts that one device reads, mean over sparse layers: `shards` devices share a layer's
    experts, and others the batch."""
    layers, _, experts = selected.shape
    by_shard = jnp.any(selected, axis=1).reshape(layers, shards, experts // shards)
    most = jnp.max(jnp.sum(by_shard, axis=2, dtype=jnp.int32), axis=1)
    return jnp.sum(pmax(most, data_axes()), dtype=jnp.float32) / max(layers, 1)


def _any_row(config: DecoderConfig, ids: list[Array], batch: int) -> Bool[Array, "layers batch experts"]:
    if not ids:
        return jnp.zeros((0, batch, config.num_experts), bool)
    chosen = jnp.stack([layer.reshape(batch, -1) for layer in ids])
    every = jnp.arange(config.num_experts, dtype=jnp.int32)
    return jnp.any(chosen[..., None] == every[None, None, None, :], axis=2)
