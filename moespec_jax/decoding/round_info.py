"""What rounds of speculative decoding did: one in full, and sums over the rounds of a call. Collected on the device."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.decoder import ForwardInfo
from moespec_jax.parallel.collectives import largest, over_data, total


class BudgetInfo(NamedTuple):
    """What a budget did in one pass. `shortlist` holds every sparse layer's expert ids, best first, `num_experts` in
    slots not in use; `mass_kept` its share of the scores; `replaced` the share of tokens, over layers, that lost an
    expert of their own."""

    shortlist: Int[Array, "layers slots"]
    mass_kept: Float[Array, " layers"]
    replaced: Float[Array, ""]


class RoundInfo(NamedTuple):
    """What one round did, for every sequence: whether it took part, its tree, what was accepted, and in each sparse
    layer which experts its rows chose (`wanted`) and which they went to (`read`)."""

    active: Bool[Array, " batch"]
    tree: Tree
    accepted: Accepted
    wanted: Bool[Array, "layers batch experts"]
    read: Bool[Array, "layers batch experts"]
    budget: BudgetInfo | None


class SpeculationInfo(NamedTuple):
    """Of one call: rounds run; for each sequence the rounds it took part in and how many of them committed a node of
    depth 1, 2, ...; sums over rounds of the mean number of distinct experts that a layer wanted, that it read, and that
    the busiest device read of it, of the share of the scores that shortlists kept, and of the share of tokens that lost
    an expert; the last round."""

    rounds: Int[Array, ""]
    active: Int[Array, " batch"]
    accepted: Int[Array, "batch depths"]
    experts_wanted: Float[Array, ""]
    experts_read: Float[Array, ""]
    experts_slowest: Float[Array, ""]
    mass_kept: Float[Array, ""]
    replaced: Float[Array, ""]
    last: RoundInfo


def round_info(
    config: DecoderConfig, active: Bool[Array, " batch"], tree: Tree, accepted: Accepted, info: ForwardInfo
) -> RoundInfo:
    """Of a round whose verifying pass told `info`."""
    batch = active.shape[0]
    wanted = experts_wanted(config, info, batch)
    restricted = [router.restricted for router in info.routers if router.restricted is not None]
    if not restricted:
        return RoundInfo(active, tree, accepted, wanted, wanted, None)
    tokens = total(jnp.sum(active, dtype=jnp.float32) * tree.tokens.shape[1], over_data())
    lost = sum(jnp.sum(layer.replaced, dtype=jnp.float32) for layer in restricted) / len(restricted)
    lost = total(jnp.asarray(lost), over_data())
    budget = BudgetInfo(
        jnp.stack([layer.shortlist for layer in restricted]),
        jnp.stack([layer.mass_kept for layer in restricted]),
        lost / jnp.maximum(tokens, 1.0),
    )
    return RoundInfo(active, tree, accepted, wanted, experts_read(config, info, batch), budget)


def no_rounds(config: DecoderConfig, tree: TreeConfig, budget: BudgetConfig | None, batch: int) -> SpeculationInfo:
    """Nothing done yet."""
    shape, path = (batch, tree.size), tree.longest_path
    nodes = Tree(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    count, nothing = jnp.zeros((batch,), jnp.int32), jnp.float32(0.0)
    layers = config.num_sparse_layers
    hit = jnp.zeros((layers, batch, config.num_experts), bool)
    kept = None
    if budget is not None and layers:
        shortlist = jnp.zeros((layers, budget.slots), jnp.int32)
        kept = BudgetInfo(shortlist, jnp.zeros((layers,), jnp.float32), nothing)
    accepted = Accepted(jnp.zeros((batch, path), jnp.int32), count, count)
    last = RoundInfo(count > 0, nodes, accepted, hit, hit, kept)
    by_depth = jnp.zeros((batch, path - 1), jnp.int32)
    return SpeculationInfo(jnp.int32(0), count, by_depth, nothing, nothing, nothing, nothing, nothing, last)


def committed_depths(happened: RoundInfo) -> Bool[Array, "batch path"]:
    """Whether a round committed a node of depth 0 (the root), 1, ... of every sequence that took part."""
    depth = jnp.arange(happened.accepted.path.shape[1], dtype=jnp.int32)[None, :]
    return (depth < happened.accepted.count[:, None]) & happened.active[:, None]


def add_round(info: SpeculationInfo, last: RoundInfo, shards: int = 1) -> SpeculationInfo:
    """One round more, by devices that share a layer's experts in so many shards."""
    wanted = mean_distinct_experts(last.wanted)
    read, kept, replaced = wanted, jnp.float32(1.0), jnp.float32(0.0)
    if last.budget is not None:
        read, kept, replaced = mean_distinct_experts(last.read), jnp.mean(last.budget.mass_kept), last.budget.replaced
    return SpeculationInfo(
        info.rounds + 1,
        info.active + last.active.astype(jnp.int32),
        info.accepted + committed_depths(last)[:, 1:].astype(jnp.int32),
        info.experts_wanted + wanted,
        info.experts_read + read,
        info.experts_slowest + mean_experts_of_busiest(last.read, shards),
        info.mass_kept + kept,
        info.replaced + replaced,
        last,
    )


def experts_wanted(config: DecoderConfig, info: ForwardInfo, batch: int) -> Bool[Array, "layers batch experts"]:
    """Whether any row of a sequence chose an expert, in every sparse layer."""
    return _any_row(config, [router.experts for router in info.routers], batch)


def experts_read(config: DecoderConfig, info: ForwardInfo, batch: int) -> Bool[Array, "layers batch experts"]:
    """Whether any row of a sequence went to an expert, in every sparse layer: what it chose, or what a budget left."""
    routed = [r.experts if r.restricted is None else r.restricted.routing.experts for r in info.routers]
    return _any_row(config, routed, batch)


def _any_row(config: DecoderConfig, ids: list[Array], batch: int) -> Bool[Array, "layers batch experts"]:
    if not ids:
        return jnp.zeros((0, batch, config.num_experts), bool)
    chosen = jnp.stack([layer.reshape(batch, -1) for layer in ids])
    every = jnp.arange(config.num_experts, dtype=jnp.int32)
    return jnp.any(chosen[..., None] == every[None, None, None, :], axis=2)


def mean_distinct_experts(hit: Bool[Array, "layers batch experts"]) -> Float[Array, ""]:
    """Distinct experts routed to in a pass over the whole batch, averaged over sparse layers; 0 without any."""
    return jnp.sum(largest(jnp.any(hit, axis=1), over_data()), dtype=jnp.float32) / max(hit.shape[0], 1)


def mean_experts_of_busiest(hit: Bool[Array, "layers batch experts"], shards: int) -> Float[Array, ""]:
    """The most distinct experts that one device reads in a pass, of `shards` that share a layer's experts and all that
    share the batch, averaged over sparse layers."""
    each = jnp.any(hit, axis=1).reshape(hit.shape[0], shards, -1)
    most = jnp.max(jnp.sum(each, axis=2, dtype=jnp.int32), axis=1)
    return jnp.sum(largest(most, over_data()), dtype=jnp.float32) / max(hit.shape[0], 1)
