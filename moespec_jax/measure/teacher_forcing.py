"""Texts followed token by token through the target's verifying passes: what a tree and a budget do to its distribution.

The head drafts a tree, the target verifies it under the budget, and of the tree that path is committed which the text
takes, with the rows of keys and values that the budget left. So errors pile up in the cache as they do in use, and
every logit has the exact target's to be compared with, of the same text: one plain pass without a budget. Every text
is a batch of its own to the budget.

Rounds count what the text takes: on the target's own greedy text that is what greedy decoding accepts, on any other how
well the head guesses the text. Under a faithful rule it is less: what is given up is not committed.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.accept import Accepted, cut_path
from moespec_jax.decoding.autoregressive import DecodeState
from moespec_jax.decoding.budget import Nodes, restrict_to
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.round_info import experts_read, experts_wanted
from moespec_jax.decoding.speculative import (
    SpeculationSettings,
    SpeculationState,
    Speculator,
    append_path,
    draft_trees,
    verify_trees,
)
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.cache import empty_cache, keep_rows
from moespec_jax.nn.decoder import Decoder, ForwardInfo, forward, unembed
from moespec_jax.nn.routing import Restricted, Routing


class Followed(NamedTuple):
    """What following texts told. At position p, which sees the text up to token p: the divergence KL(exact || verified)
    of the next token's distribution in nats, whether both have the same first choice, and the log-probability of the
    text's next token; not a number where no round has been. Sums over each text's `rounds`: how many committed a node
    of depth 1, 2, ..., distinct experts wanted and read a layer, and the share of tokens that lost an expert."""

    kl: Float[Array, "texts positions"]
    same: Float[Array, "texts positions"]
    log_probability: Float[Array, "texts positions"]
    rounds: Float[Array, " texts"]
    committed: Float[Array, "texts depths"]
    wanted: Float[Array, " texts"]
    read: Float[Array, " texts"]
    replaced: Float[Array, " texts"]


def follow(
    settings: SpeculationSettings,
    params: Speculator,
    state: SpeculationState,
    exact: Float[Array, "texts positions vocab"],
    bound: Int[Array, ""],
) -> Followed:
    """Every text of `state` (its tokens up to `limit`) to its end, with at most `bound` experts a layer
    and text where `settings` have a budget; `exact` are the log-probabilities of a plain pass."""
    settings = settings._replace(restrict=partial(restrict_each, bound))

    def step(carry: tuple[SpeculationState, Followed]) -> tuple[SpeculationState, Followed]:
        state, done = carry
        accepted, logits, info, after = follow_round(settings, params, state)
        done = add_rows(settings, done, state.decoding, logits, accepted, exact)
        return after, add_sums(settings, done, ~state.decoding.done, accepted, info)

    start = (state, nothing_followed(settings, exact))
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].decoding.done), step, start)[1]


def follow_round(
    settings: SpeculationSettings, params: Speculator, state: SpeculationState
) -> tuple[Accepted, Float[Array, "texts nodes vocab"], ForwardInfo, SpeculationState]:
    """As `speculative.speculation_round`, but what the text takes is committed: the tokens of `state`, up to its limit.
    Also the logits of all nodes, what the verification told, and the state after it."""
    trees, draft_cache = draft_trees(settings, params, state)
    logits, kv, info = verify_trees(settings, params.target, state, trees)
    decoding = state.decoding
    accepted = jax.vmap(partial(take_path, settings.tree.longest_path))(
        trees, decoding.tokens, decoding.length, decoding.limit
    )
    if settings.budget is not None and settings.budget.gives_up:
        live = _restricted(info)[-1].live.reshape(trees.tokens.shape)
        accepted = jax.vmap(cut_path)(trees, accepted, live)
    reached = state.reached + jnp.sum(_committed(settings, accepted, ~decoding.done), axis=0)
    kv = keep_rows(kv, decoding.length - 1, accepted.path, settings.tree.size)
    taps = jnp.take_along_axis(info.taps, accepted.path[:, :, None], axis=1)  # pyright: ignore[reportArgumentType]
    decoding = append_path(dataclasses.replace(decoding, cache=kv), trees, accepted)
    return accepted, logits, info, SpeculationState(decoding, draft_cache, taps, reached)


def nothing_followed(settings: SpeculationSettings, exact: Float[Array, "texts positions vocab"]) -> Followed:
    """Where following starts."""
    unknown, zero = jnp.full(exact.shape[:2], jnp.nan), jnp.zeros(exact.shape[0])
    committed = jnp.zeros((exact.shape[0], settings.tree.longest_path - 1))
    return Followed(unknown, unknown, unknown, zero, committed, zero, zero, zero)


def take_path(
    longest: int, tree: Tree, text: Int[Array, " tokens"], index: Int[Array, ""], limit: Int[Array, ""]
) -> Accepted:
    """The nodes that the text takes from position `index` on, as far as `limit`, and the token after them."""

    def step(carry: tuple[Array, Array], level: Array) -> tuple[tuple[Array, Array], Array]:
        node, count = carry
        child = (tree.parents == node) & (tree.tokens == text[index + level]) & (count == level + 1)
        found = jnp.any(child) & (index + level < limit)
        node = jnp.where(found, jnp.argmax(child).astype(jnp.int32), node)
        return (node, count + found.astype(jnp.int32)), node

    levels = jnp.arange(longest - 1, dtype=jnp.int32)
    (_, count), path = jax.lax.scan(step, (jnp.int32(0), jnp.int32(1)), levels)
    return Accepted(jnp.concatenate([jnp.zeros((1,), jnp.int32), path]), count, text[index + count - 1])


def add_rows(
    settings: SpeculationSettings,
    done: Followed,
    decoding: DecodeState,
    logits: Array,
    accepted: Accepted,
    exact: Array,
) -> Followed:
    """The committed rows of every unfinished text, at their positions."""
    before = done.kl, done.same, done.log_probability
    limit = jnp.where(decoding.done, 0, decoding.limit)
    kl, same, log_probability = jax.vmap(partial(_add_rows, settings.tree.longest_path))(
        before, decoding.length, limit, decoding.tokens, logits, accepted, exact
    )
    return done._replace(kl=kl, same=same, log_probability=log_probability)


def _add_rows(
    longest: int,
    before: tuple[Array, Array, Array],
    length: Int[Array, ""],
    limit: Int[Array, ""],
    text: Int[Array, " tokens"],
    logits: Float[Array, "nodes vocab"],
    accepted: Accepted,
    exact: Float[Array, "positions vocab"],
) -> tuple[Array, ...]:
    step = jnp.arange(longest, dtype=jnp.int32)
    position = length - 1 + step
    # A text's last token has nothing after it to be asked for.
    where = jnp.where((step < accepted.count) & (position < limit - 1), position, exact.shape[0])
    position = jnp.minimum(position, exact.shape[0] - 1)
    verified, own = jax.nn.log_softmax(logits[accepted.path], axis=-1), exact[position]
    divergence = jnp.sum(jnp.exp(own) * (own - verified), axis=-1)
    same = (jnp.argmax(own, axis=-1) == jnp.argmax(verified, axis=-1)).astype(jnp.float32)
    following = jnp.take_along_axis(verified, text[position + 1][:, None], axis=-1)[:, 0]
    rows = zip(before, (divergence, same, following), strict=True)
    return tuple(old.at[where].set(new, mode="drop") for old, new in rows)


def add_sums(
    settings: SpeculationSettings, done: Followed, active: Bool[Array, " texts"], accepted: Accepted, info: ForwardInfo
) -> Followed:
    """One round more of every active text."""
    count, taking = len(active), active.astype(jnp.float32)
    wanted = _distinct(experts_wanted(settings.target.config, info, count))
    read = _distinct(experts_read(settings.target.config, info, count))
    lost = [jnp.mean(r.replaced.reshape(count, -1), axis=1, dtype=jnp.float32) for r in _restricted(info)]
    return done._replace(
        rounds=done.rounds + taking,
        committed=done.committed + _committed(settings, accepted, active)[:, 1:],
        wanted=done.wanted + taking * wanted,
        read=done.read + taking * read,
        replaced=done.replaced + taking * (sum(lost) / len(lost) if lost else jnp.zeros_like(taking)),
    )


def restrict_each(
    bound: Int[Array, ""], rule: BudgetConfig, nodes: Nodes, norm_topk_prob: bool, layer: int | Array,
    probabilities: Array, natural: Routing, valid: Array,
) -> Restricted:  # fmt: skip
    """As `budget.restrict`, with every sequence's tree to itself: what each would get as a batch of one. The layer's
    own number of experts is lowered to `bound`. Of shortlists the first tree's is told."""
    assert isinstance(rule.experts, tuple)
    bound = jnp.minimum(bound, jnp.asarray(rule.experts, jnp.int32)[layer])
    trees, size = nodes.depth.shape

    def one(nodes: Nodes, probabilities: Array, natural: Routing, valid: Array) -> Restricted:
        alone = jax.tree.map(lambda leaf: leaf[None], nodes)._replace(committed=nodes.committed)
        return restrict_to(rule, alone, norm_topk_prob, bound, probabilities, natural, valid)

    split = partial(jax.tree.map, lambda leaf: leaf.reshape(trees, size, *leaf.shape[1:]))
    axes = (Nodes(0, 0, 0, None), 0, 0, 0)  # pyright: ignore[reportArgumentType]
    found: Restricted = jax.vmap(one, axes)(nodes, split(probabilities), split(natural), split(valid))
    joined = jax.tree.map(lambda leaf: leaf.reshape(trees * size, *leaf.shape[2:]), found.routing)
    routing = dataclasses.replace(joined, max_distinct=None)
    replaced, live = found.replaced.reshape(-1), found.live.reshape(-1)
    return Restricted(routing, found.shortlist[0], jnp.mean(found.mass_kept), replaced, live)


def log_probabilities(
    settings: SpeculationSettings, params: Decoder, texts: Int[Array, "texts tokens"]
) -> Float[Array, "texts positions vocab"]:
    """The exact target's, of every next token of a text but the last: one plain pass."""
    ids = texts[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :], ids.shape)
    config, mask = settings.target.config, causal_mask(positions, ids.shape[1])
    kv = empty_cache(config, ids.shape[0], ids.shape[1], params.embed.dtype, stacked=params.stacked)
    attention = settings.target.attention
    hidden, _, _ = forward(config, params, ids, positions, mask, kv, settings.target.compute, attention=attention)
    return jax.nn.log_softmax(unembed(params, hidden), axis=-1)


def _committed(
    settings: SpeculationSettings, accepted: Accepted, active: Bool[Array, " texts"]
) -> Float[Array, "texts path"]:
    """Which depths a round committed a node of, the root's included, of every active text."""
    depth = jnp.arange(settings.tree.longest_path, dtype=jnp.int32)[None, :]
    return ((depth < accepted.count[:, None]) & active[:, None]).astype(jnp.float32)


def _restricted(info: ForwardInfo) -> list[Restricted]:
    return [router.restricted for router in info.routers if router.restricted is not None]


def _distinct(hit: Bool[Array, "layers texts experts"]) -> Float[Array, " texts"]:
    """Distinct experts of each text, averaged over layers."""
    return jnp.mean(jnp.sum(hit, axis=2, dtype=jnp.float32), axis=0)
