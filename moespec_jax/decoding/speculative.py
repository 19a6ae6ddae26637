"""Speculative decoding as compiled programs: prefill of target and head, then one `lax.while_loop` over rounds.

A round drafts a tree, verifies it in one forward pass of the target, accepts a path and keeps its cache rows; nothing
waits for the host. Streaming runs the same program a few rounds at a time, the number of rounds being traced.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DraftConfig, TreeConfig
from moespec_jax.decoding.accept import Accept, Accepted, cut_path
from moespec_jax.decoding.autoregressive import (
    NO_TOKEN,
    DecodeState,
    PrefillState,
    Settings,
    any_left,
    begin,
    empty_prefill,
    read_chunk,
    row_at,
)
from moespec_jax.decoding.budget import Nodes, restrict
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.propose import extend_draft, propose_trees
from moespec_jax.decoding.round_info import (
    RoundInfo,
    SpeculationInfo,
    add_round,
    committed_depths,
    no_rounds,
    round_info,
)
from moespec_jax.decoding.tree import Tree, ancestors, depths
from moespec_jax.nn.attention import tree_mask
from moespec_jax.nn.cache import Cache, keep_rows
from moespec_jax.nn.decoder import Decoder, ForwardInfo, forward, unembed
from moespec_jax.nn.eagle3 import DraftHead, empty_draft_cache
from moespec_jax.nn.routing import Restricted
from moespec_jax.parallel.collectives import first_row, over_data, total

# Which forward pass verifies: `decoder.forward`, or one of the same signature.
Verify = Callable[..., tuple[Array, Cache | None, ForwardInfo]]


class SpeculationSettings(NamedTuple):
    """What a speculating program is compiled for. Functions are compared by identity: keep one for all calls.

    `budget`, resolved for the target (`budget_config.resolve`), limits the experts that verification reads, by
    `restrict`; nothing else is limited.
    """

    target: Settings
    draft: DraftConfig
    tree: TreeConfig
    accept: Accept
    budget: BudgetConfig | None = None
    verify: Verify = forward
    restrict: Callable[..., Restricted] = restrict


# Another round made of the same parts: `settings._replace(accept=..., verify=..., restrict=...)`.
Adapt = Callable[[SpeculationSettings], SpeculationSettings]


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
    position `draft_cache.length[b]` up to the root's predecessor. `reached[d]` counts the rounds of all sequences that
    committed a node of depth d, the root's included.
    """

    decoding: DecodeState
    draft_cache: Cache
    taps: Float[Array, "batch path aux"]
    reached: Float[Array, " path"]


class SpeculationPrefill(NamedTuple):
    """What one prefill chunk hands to the next: as in plain decoding, with the head's cache and last tapped states."""

    cache: Cache
    last_hidden: Float[Array, "batch model"]
    draft_cache: Cache
    last_taps: Float[Array, "batch aux"]


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
    taps = jnp.concatenate([last_taps[:, None, :], rest], axis=1)
    return SpeculationState(decoding, draft_cache, taps, expected_reach(settings.tree))


def speculation_rounds(
    settings: SpeculationSettings, params: Speculator, state: SpeculationState, rounds: Int[Array, ""]
) -> tuple[SpeculationState, SpeculationInfo]:
    """Up to `rounds` rounds for every unfinished sequence."""

    def unfinished(carry: tuple[SpeculationState, SpeculationInfo]) -> Array:
        return (carry[1].rounds < rounds) & any_left(carry[0].decoding)

    def step(carry: tuple[SpeculationState, SpeculationInfo]) -> tuple[SpeculationState, SpeculationInfo]:
        state, last = speculation_round(settings, params, carry[0])
        return state, add_round(carry[1], last, params.target.split.experts)

    nothing = no_rounds(settings.target.config, settings.tree, settings.budget, len(state.taps))
    return jax.lax.while_loop(unfinished, step, (state, nothing))


def speculation_round(
    settings: SpeculationSettings, params: Speculator, state: SpeculationState
) -> tuple[SpeculationState, RoundInfo]:
    """Draft, verify, accept, keep: one forward pass of the target, `depth + 1` of the head."""
    trees, draft_cache = draft_trees(settings, params, state)
    decoding = state.decoding
    logits, cache, info = verify_trees(settings, params.target, state, trees)
    accepted = _accept(settings.accept, decoding, trees, logits, _live(settings.budget, info, trees))
    if settings.tree.top_k > 1:  # a chain's accepted rows are where they belong
        cache = keep_rows(cache, decoding.length - 1, accepted.path, settings.tree.size)
    assert info.taps is not None
    taps = jnp.take_along_axis(info.taps, accepted.path[:, :, None], axis=1)
    happened = round_info(settings.target.config, ~decoding.done, trees, accepted, info)
    reached = total(jnp.sum(committed_depths(happened), axis=0, dtype=jnp.float32), over_data())
    decoding = append_path(dataclasses.replace(decoding, cache=cache), trees, accepted)
    return SpeculationState(decoding, draft_cache, taps, state.reached + reached), happened


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
    settings: SpeculationSettings, target: Decoder, state: SpeculationState, trees: Tree
) -> tuple[Float[Array, "batch nodes vocab"], Cache, ForwardInfo]:
    """The target's logits at every node, its cache with the nodes' rows behind the committed ones, and its taps."""
    decoding, config = state.decoding, settings.target.config
    known = decoding.length - 1
    own = jax.vmap(ancestors)(trees.parents)
    depth = jax.vmap(depths)(own)
    positions = known[:, None] + depth
    limit = None
    if settings.budget is not None:
        nodes = Nodes(jnp.exp(trees.scores), depth, own, state.reached / state.reached[0])
        limit = partial(settings.restrict, settings.budget, nodes, config.norm_topk_prob)
    hidden, cache, info = settings.verify(
        config,
        target,
        trees.tokens,
        positions,
        tree_mask(own, known, decoding.cache.slots),
        dataclasses.replace(decoding.cache, length=known),
        settings.target.compute,
        valid=jnp.broadcast_to(~decoding.done[:, None], trees.tokens.shape),
        longest=positions + 1,  # of the pass that would have read this node in plain decoding
        boundaries=settings.draft.boundaries,
        restrict=limit,
        attention=settings.target.attention,
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


def expected_reach(tree: TreeConfig) -> Float[Array, " path"]:
    """What `SpeculationState.reached` starts from, as of a few rounds: each depth halves, until rounds tell better."""
    return 4.0 * 0.5 ** jnp.arange(tree.longest_path, dtype=jnp.float32)


def _accept(accept: Accept, decoding: DecodeState, trees: Tree, logits: Array, live: Array | None) -> Accepted:
    row = first_row(len(logits)) + jnp.arange(len(logits), dtype=jnp.int32)
    keys = jax.vmap(lambda r: jax.random.fold_in(decoding.key, r))(row)
    accepted = jax.vmap(accept)(trees, logits, keys, decoding.length)
    decided = jnp.take_along_axis(logits, accepted.path[:, :, None], axis=1)
    finite = jnp.isfinite(jnp.max(decided, axis=(1, 2)))
    accepted = dataclasses.replace(accepted, bonus=jnp.where(finite, accepted.bonus, NO_TOKEN))
    return accepted if live is None else jax.vmap(cut_path)(trees, accepted, live)


def _live(budget: BudgetConfig | None, info: ForwardInfo, trees: Tree) -> Bool[Array, "batch nodes"] | None:
    """Nodes that a budget has not given up; None where it gives up none."""
    if budget is None or not budget.gives_up or not info.routers:
        return None
    restricted = info.routers[-1].restricted
    assert restricted is not None
    return restricted.live.reshape(trees.tokens.shape)
