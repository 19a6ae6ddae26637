"""Speculative decoding as compiled programs: prefill of target and head, then one `lax.while_loop` over rounds.

A round drafts a tree, verifies it in one forward pass of the target, accepts a path and keeps its cache rows; nothing
waits for the host. Streaming runs the same program a few rounds at a time, the number of rounds being traced.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.accept import Accept, Accepted
from moespec_jax.attention import tree_mask
from moespec_jax.cache import Cache, keep_rows
from moespec_jax.config import DraftConfig, TreeConfig
from moespec_jax.decode import (
    DecodeState,
    PrefillState,
    Settings,
    begin,
    empty_prefill,
    experts_hit,
    mean_distinct_experts,
    read_chunk,
    row_at,
)
from moespec_jax.decoder import Decoder, ForwardInfo, forward, unembed
from moespec_jax.draft import DraftHead, empty_draft_cache
from moespec_jax.propose import extend_draft, propose_trees
from moespec_jax.tree import Tree, ancestors, depths

# Which forward pass verifies: `decoder.forward`, or one of the same signature.
Verify = Callable[..., tuple[Array, Cache | None, ForwardInfo]]


class SpeculationSettings(NamedTuple):
    """What a speculating program is compiled for. Functions are compared by identity: keep one for all calls."""

    target: Settings
    draft: DraftConfig
    tree: TreeConfig
    accept: Accept
    verify: Verify = forward


@struct.dataclass
class Speculator:
    """Parameters of target and head."""

    target: Decoder
    draft: DraftHead


@struct.dataclass
class SpeculationState:
    """A batch of sequences under way.

    `decoding` is as in plain decoding: the newest token, which is the next tree's root, is not in the cache yet. The
    head's cache lags further behind: `taps` are the target's states of the tokens whose pairs it still lacks, from
    position `draft_cache.length[b]` up to the root's predecessor.
    """

    decoding: DecodeState
    draft_cache: Cache
    taps: Float[Array, "batch path aux"]


class SpeculationPrefill(NamedTuple):
    """What one prefill chunk hands to the next: as in plain decoding, with the head's cache and last tapped states."""

    cache: Cache
    last_hidden: Float[Array, "batch model"]
    draft_cache: Cache
    last_taps: Float[Array, "batch aux"]


class RoundInfo(NamedTuple):
    """What one round did, for every sequence: whether it took part, its tree, what was accepted, and which experts its
    rows went to in each sparse layer."""

    active: Bool[Array, " batch"]
    tree: Tree
    accepted: Accepted
    experts: Bool[Array, "layers batch experts"]


class SpeculationInfo(NamedTuple):
    """Of one call: rounds run; for each sequence the rounds it took part in and how many of them accepted a node of
    depth 1, 2, ...; the sum over rounds of the mean number of distinct experts a layer wanted; the last round."""

    rounds: Int[Array, ""]
    active: Int[Array, " batch"]
    experts_wanted: Float[Array, ""]
    accepted: Int[Array, "batch depths"]
    last: RoundInfo


def cache_margin(tree: TreeConfig) -> int:
    """Slots that a round may write behind a sequence's last token."""
    return max(tree.size, tree.depth * tree.top_k, tree.longest_path) + 1


def empty_speculation_prefill(
    settings: SpeculationSettings, batch: int, slots: int, dtype: DTypeLike, *, stacked: bool
) -> SpeculationPrefill:
    """Nothing read yet."""
    target = empty_prefill(settings.target.config, batch, slots, dtype, stacked=stacked)
    cache = empty_draft_cache(settings.draft, batch, slots, dtype)
    return SpeculationPrefill(*target, cache, jnp.zeros((batch, settings.draft.aux_size), dtype))


def speculation_prefill_chunk(
    settings: SpeculationSettings,
    params: Speculator,
    state: SpeculationPrefill,
    tokens: Int[Array, "batch chunk_and_one"],
    start: Int[Array, ""],
    prompt_lengths: Int[Array, " batch"],
) -> SpeculationPrefill:
    """Read one chunk of every prompt with the target, and its pairs with the head; `tokens` has one token more than
    the chunk, for a pair holds the token after its feature. The pair of a prompt's last token waits for the first draw.
    """
    chunk, boundaries = tokens[:, :-1], settings.draft.boundaries
    before = PrefillState(state.cache, state.last_hidden)
    target, taps = read_chunk(settings.target, params.target, before, chunk, start, prompt_lengths, boundaries)
    assert taps is not None
    cache = dataclasses.replace(state.draft_cache, length=jnp.broadcast_to(start, prompt_lengths.shape))
    _, cache = extend_draft(settings.draft, params.draft, params.target.embed, taps, tokens[:, 1:], cache)
    last = row_at(taps, prompt_lengths - 1 - start, state.last_taps)
    return SpeculationPrefill(*target, cache, last)


def begin_speculation(
    settings: SpeculationSettings,
    params: Speculator,
    cache: Cache,
    last_hidden: Float[Array, "batch model"],
    draft_cache: Cache,
    last_taps: Float[Array, "batch aux"],
    tokens: Int[Array, "batch slots"],
    prompt_lengths: Int[Array, " batch"],
    limit: Int[Array, " batch"],
    stop_ids: Int[Array, " stops"],
    key: Array,
) -> SpeculationState:
    """Draw every sequence's first token from what prefill saw last."""
    decoding = begin(settings.target, params.target, cache, last_hidden, tokens, prompt_lengths, limit, stop_ids, key)
    draft_cache = dataclasses.replace(draft_cache, length=prompt_lengths - 1)
    rest = jnp.zeros((len(tokens), settings.tree.longest_path - 1, settings.draft.aux_size), last_taps.dtype)
    return SpeculationState(decoding, draft_cache, jnp.concatenate([last_taps[:, None, :], rest], axis=1))


def speculation_rounds(
    settings: SpeculationSettings, params: Speculator, state: SpeculationState, rounds: Int[Array, ""]
) -> tuple[SpeculationState, SpeculationInfo]:
    """Up to `rounds` rounds for every unfinished sequence."""

    def unfinished(carry: tuple[SpeculationState, SpeculationInfo]) -> Array:
        return (carry[1].rounds < rounds) & ~jnp.all(carry[0].decoding.done)

    def step(carry: tuple[SpeculationState, SpeculationInfo]) -> tuple[SpeculationState, SpeculationInfo]:
        state, last = speculation_round(settings, params, carry[0])
        return state, _add_round(carry[1], last)

    return jax.lax.while_loop(unfinished, step, (state, _no_rounds(settings, state)))


def speculation_round(
    settings: SpeculationSettings, params: Speculator, state: SpeculationState
) -> tuple[SpeculationState, RoundInfo]:
    """Draft, verify, accept, keep: one forward pass of the target, `depth + 1` of the head."""
    trees, draft_cache = draft_trees(settings, params, state)
    decoding = state.decoding
    logits, cache, info = verify_trees(settings, params.target, decoding, trees)
    accepted = _accept(settings.accept, decoding, trees, logits)
    if settings.tree.top_k > 1:  # a chain's accepted rows are where they belong
        cache = keep_rows(cache, decoding.length - 1, accepted.path, settings.tree.size)
    assert info.taps is not None
    taps = jnp.take_along_axis(info.taps, accepted.path[:, :, None], axis=1)
    experts = experts_hit(settings.target.config, info, len(trees.tokens))
    happened = RoundInfo(~decoding.done, trees, accepted, experts)
    decoding = append_path(dataclasses.replace(decoding, cache=cache), trees, accepted)
    return SpeculationState(decoding, draft_cache, taps), happened


def draft_trees(settings: SpeculationSettings, params: Speculator, state: SpeculationState) -> tuple[Tree, Cache]:
    """Every sequence's tree, and the head's cache with the pairs that the last round confirmed."""
    decoding, width, embed = state.decoding, settings.tree.longest_path, params.target.embed
    confirmed = state.draft_cache.length
    after = confirmed[:, None] + 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
    following = jnp.take_along_axis(decoding.tokens, after, axis=1)
    outputs, cache = extend_draft(settings.draft, params.draft, embed, state.taps, following, state.draft_cache)
    known = decoding.length - 1  # pairs there are now, and tokens in the target's cache: all but the root
    last = jnp.clip(known - 1 - confirmed, 0, width - 1)
    outputs = jnp.take_along_axis(outputs, last[:, None, None], axis=1)[:, 0]
    roots = jnp.take_along_axis(decoding.tokens, known[:, None], axis=1)[:, 0]
    cache = dataclasses.replace(cache, length=known)
    return propose_trees(settings.draft, settings.tree, params.draft, embed, outputs, roots, cache)


def verify_trees(
    settings: SpeculationSettings, target: Decoder, decoding: DecodeState, trees: Tree
) -> tuple[Float[Array, "batch nodes vocab"], Cache, ForwardInfo]:
    """The target's logits at every node, its cache with the nodes' rows behind the committed ones, and its taps."""
    known = decoding.length - 1
    own = jax.vmap(ancestors)(trees.parents)
    positions = known[:, None] + jax.vmap(depths)(own)
    hidden, cache, info = settings.verify(
        settings.target.config,
        target,
        trees.tokens,
        positions,
        tree_mask(own, known, decoding.cache.slots),
        dataclasses.replace(decoding.cache, length=known),
        settings.target.compute,
        valid=jnp.broadcast_to(~decoding.done[:, None], trees.tokens.shape),
        longest=positions + 1,  # of the pass that would have read this node in plain decoding
        boundaries=settings.draft.boundaries,
    )
    assert cache is not None
    return unembed(target, hidden), cache, info


def append_path(decoding: DecodeState, trees: Tree, accepted: Accepted) -> DecodeState:
    """Append accepted tokens and bonus to every unfinished sequence, cut where plain decoding would have stopped: after
    the first stop id, or at the limit."""
    width = accepted.path.shape[1]
    step = jnp.arange(width, dtype=jnp.int32)[None, :]
    path_tokens = jnp.take_along_axis(trees.tokens, accepted.path, axis=1)
    new = jnp.where(step < accepted.count[:, None] - 1, jnp.roll(path_tokens, -1, axis=1), accepted.bonus[:, None])
    stops = jnp.any(new[:, :, None] == decoding.stop_ids[None, None, :], axis=-1)
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, width)
    room = jnp.maximum(decoding.limit - decoding.length, 0)
    count = jnp.minimum(jnp.minimum(accepted.count, until_stop), room)
    count = jnp.where(decoding.done, 0, count)
    stopped = jnp.any(stops & (step < count[:, None]), axis=1)
    length = decoding.length + count
    # Which of the new tokens each slot of the buffer takes, if any.
    slot = jnp.arange(decoding.tokens.shape[1], dtype=jnp.int32)[None, :] - decoding.length[:, None]
    here = (slot >= 0) & (slot < count[:, None])
    taken = jnp.take_along_axis(new, jnp.clip(slot, 0, width - 1), axis=1)
    return dataclasses.replace(
        decoding,
        tokens=jnp.where(here, taken, decoding.tokens),
        length=length,
        done=decoding.done | stopped | (length >= decoding.limit),
    )


def _accept(accept: Accept, decoding: DecodeState, trees: Tree, logits: Array) -> Accepted:
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)
    keys = jax.vmap(lambda r: jax.random.fold_in(decoding.key, r))(row)
    return jax.vmap(accept)(trees, logits, keys, decoding.length)


def _no_rounds(settings: SpeculationSettings, state: SpeculationState) -> SpeculationInfo:
    batch, width = state.taps.shape[:2]
    shape = (batch, settings.tree.size)
    tree = Tree(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    zero = jnp.zeros((batch,), jnp.int32)
    config = settings.target.config
    hit = jnp.zeros((config.num_sparse_layers, batch, config.num_experts), bool)
    last = RoundInfo(zero > 0, tree, Accepted(jnp.zeros((batch, width), jnp.int32), zero, zero), hit)
    return SpeculationInfo(jnp.int32(0), zero, jnp.float32(0.0), jnp.zeros((batch, width - 1), jnp.int32), last)


def _add_round(info: SpeculationInfo, last: RoundInfo) -> SpeculationInfo:
    depth = jnp.arange(1, info.accepted.shape[1] + 1, dtype=jnp.int32)[None, :]
    reached = (depth < last.accepted.count[:, None]) & last.active[:, None]
    return SpeculationInfo(
        info.rounds + 1,
        info.active + last.active.astype(jnp.int32),
        info.experts_wanted + mean_distinct_experts(last.experts),
        info.accepted + reached.astype(jnp.int32),
        last,
    )
