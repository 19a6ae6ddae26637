"""Teacher forcing: texts run token by token through the target's verifications, to measure how a tree and a budget
change its distribution.

The drafter proposes a tree, the target verifies it under the budget, and the path that the text takes is committed,
with the cache rows that the budget left. So errors accumulate in the cache as they do in use, and every logit is
compared with the exact target's of the same text, from one plain pass without a budget. To the budget, every text is a
batch of its own.

A round's length is that of the text's path: on the target's own greedy text what greedy decoding would accept, on any
other text how well the drafter predicts it. A budget that prunes commits less: pruned nodes are not committed.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.accept import Accepted, cut_path
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget import restrict_to
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.budget_rules import Nodes
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.round_info import committed_depths, experts_read, experts_wanted
from moespec_jax.decoding.speculative import Speculative, append_path, kept_nodes
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.states import DecodeState, any_unfinished
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.plain_pass import plain_pass
from moespec_jax.nn.cache import keep_rows
from moespec_jax.nn.decoder import Decoder, ForwardInfo, unembed
from moespec_jax.nn.routing import Restricted, Routing
from moespec_jax.parallel.collectives import data_axes, pmean, psum


class ForcedStats(NamedTuple):
    """Measurements of teacher-forced verification. Values at position p are those of the prediction after token p, NaN
    where there was no round.

    Fields:
        kl: KL(exact || verified) of the next token's distribution, in nats.
        same: 1 where both distributions have the same most probable token, else 0.
        log_probability: the verified one of the text's next token.
        rounds: number of rounds of each text.
        committed: rounds that committed a node of depth 1, 2, ...
        wanted: sum over rounds of the distinct experts that a layer's rows selected.
        read: the same of the experts that were read.
        replaced: sum over rounds of the share of rows that lost an expert of their own.
    """

    kl: Float[Array, "texts positions"]
    same: Float[Array, "texts positions"]
    log_probability: Float[Array, "texts positions"]
    rounds: Float[Array, " texts"]
    committed: Float[Array, "texts depths"]
    wanted: Float[Array, " texts"]
    read: Float[Array, " texts"]
    replaced: Float[Array, " texts"]


class ExactStates(NamedTuple):
    """The exact target's hidden states after the last norm, in place of log-probabilities: those of long texts have no
    room, and are computed for the positions of one round at a time."""

    states: Float[Array, "*texts positions model"]


def forced_stats_specs() -> ForcedStats:
    """Sharding of the stats on a mesh."""
    return ForcedStats(*[BY_SEQUENCE] * len(ForcedStats._fields))  # pyright: ignore[reportArgumentType]


# The drafter may be of any kind.
Method = Speculative[Any, Any]
State = SpeculationState[Any]


def teacher_force(
    method: Method,
    params: SpeculativeParams[Any],
    state: State,
    exact: Float[Array, "texts positions vocab"] | ExactStates,
    most: Int[Array, ""],
) -> ForcedStats:
    """Run every text of `state` (its tokens up to `limit`) to its end.

    Under a budget a layer reads at most `most` experts for a text. `exact` are the `log_probabilities` of the texts, or
    what they are computed from.
    """
    method = dataclasses.replace(method, restrict=partial(restrict_each, most))

    def step(carry: tuple[State, ForcedStats]) -> tuple[State, ForcedStats]:
        state, stats = carry
        accepted, logits, info, after = forced_round(method, params, state)
        stats = add_rows(method, params.target, stats, state.decoding, logits, accepted, exact)
        return after, add_sums(method, stats, ~state.decoding.done, accepted, info)

    start = (state, empty_stats(method, *jax.tree.leaves(exact)[0].shape[:2]))
    return jax.lax.while_loop(lambda carry: any_unfinished(carry[0].decoding), step, start)[1]


def forced_round(
    method: Method, params: SpeculativeParams[Any], state: State
) -> tuple[Accepted, Float[Array, "texts nodes vocab"], ForwardInfo, State]:
    """Run `Speculative.round`, but commit the path that the text takes: the tokens of `state`, up to its limit.

    Also returns the logits of all nodes and the intermediate results of the verification.
    """
    trees, state = method.propose(params, state)
    logits, cache, info = method.verify(params, state, trees)
    decoding = state.decoding
    accepted = jax.vmap(partial(take_path, method.tree.longest_path))(
        trees, decoding.tokens, decoding.length, decoding.limit
    )
    kept = kept_nodes(method.budget, info, trees)
    if kept is not None:
        accepted = jax.vmap(cut_path)(trees, accepted, kept)
    committed = committed_depths(accepted, ~decoding.done)
    counts = state.depth_counts + psum(jnp.sum(committed, axis=0, dtype=jnp.float32), data_axes())
    cache = keep_rows(cache, decoding.length - 1, accepted.path, method.tree.size)
    draft = method.drafter.commit(state.draft, accepted, info.aux_hidden_states)
    decoding = append_path(dataclasses.replace(decoding, cache=cache), trees, accepted, logits)
    return accepted, logits, info, dataclasses.replace(state, decoding=decoding, draft=draft, depth_counts=counts)


def empty_stats(method: Method, texts: int, positions: int) -> ForcedStats:
    """Make the stats before the first round: NaN at all positions, sums of 0."""
    unknown, zero = jnp.full((texts, positions), jnp.nan), jnp.zeros(texts)
    committed = jnp.zeros((texts, method.tree.longest_path - 1))
    return ForcedStats(unknown, unknown, unknown, zero, committed, zero, zero, zero)


def take_path(
    longest: int, tree: Tree, text: Int[Array, " tokens"], index: Int[Array, ""], limit: Int[Array, ""]
) -> Accepted:
    """Find the path of the text from position `index`, up to `limit`; the bonus token is the text's token after it."""

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
    method: Method,
    target: Decoder,
    stats: ForcedStats,
    decoding: DecodeState,
    logits: Array,
    accepted: Accepted,
    exact: Array | ExactStates,
) -> ForcedStats:
    """Add the committed rows of every unfinished text, at their positions."""
    before = stats.kl, stats.same, stats.log_probability
    limit = jnp.where(decoding.done, 0, decoding.limit)
    kl, same, log_probability = jax.vmap(partial(_add_rows, method.tree.longest_path, target))(
        before, decoding.length, limit, decoding.tokens, logits, accepted, exact
    )
    return stats._replace(kl=kl, same=same, log_probability=log_probability)


def _add_rows(
    longest: int,
    target: Decoder,
    before: tuple[Array, Array, Array],
    length: Int[Array, ""],
    limit: Int[Array, ""],
    text: Int[Array, " tokens"],
    logits: Float[Array, "nodes vocab"],
    accepted: Accepted,
    exact: Float[Array, "positions vocab"] | ExactStates,
) -> tuple[Array, ...]:
    step = jnp.arange(longest, dtype=jnp.int32)
    position = length - 1 + step
    # The last token of a text has no next token to compare.
    size = before[0].shape[0]
    where = jnp.where((step < accepted.count) & (position < limit - 1), position, size)
    position = jnp.minimum(position, size - 1)
    verified, log_p = jax.nn.log_softmax(logits[accepted.path], axis=-1), _exact_rows(target, exact, position)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - verified), axis=-1)
    same = (jnp.argmax(log_p, axis=-1) == jnp.argmax(verified, axis=-1)).astype(jnp.float32)
    next_token = jnp.take_along_axis(verified, text[position + 1][:, None], axis=-1)[:, 0]
    rows = zip(before, (divergence, same, next_token), strict=True)
    return tuple(old.at[where].set(new, mode="drop") for old, new in rows)


def _exact_rows(
    target: Decoder, exact: Array | ExactStates, position: Int[Array, " path"]
) -> Float[Array, "path vocab"]:
    """Exact log-probabilities at some positions of one text."""
    if isinstance(exact, ExactStates):
        return jax.nn.log_softmax(unembed(target, exact.states[position]), axis=-1)
    return exact[position]


def add_sums(
    method: Method, stats: ForcedStats, active: Bool[Array, " texts"], accepted: Accepted, info: ForwardInfo
) -> ForcedStats:
    """Add one round of every active text."""
    count, taking = len(active), active.astype(jnp.float32)
    wanted = _distinct(experts_wanted(method.target.config, info, count))
    read = _distinct(experts_read(method.target.config, info, count))
    lost = [jnp.mean(r.replaced.reshape(count, -1), axis=1, dtype=jnp.float32) for r in _restricted(info)]
    committed = committed_depths(accepted, active).astype(jnp.float32)
    return stats._replace(
        rounds=stats.rounds + taking,
        committed=stats.committed + committed[:, 1:],
        wanted=stats.wanted + taking * wanted,
        read=stats.read + taking * read,
        replaced=stats.replaced + taking * (sum(lost) / len(lost) if lost else jnp.zeros_like(taking)),
    )


def restrict_each(
    most: Int[Array, ""], budget: BudgetConfig, nodes: Nodes, norm_topk_prob: bool, layer: int | Array,
    probabilities: Array, natural: Routing, valid: Array,
) -> Restricted:  # fmt: skip
    """Restrict a layer as `budget.restrict` does, but with a shortlist for each sequence, as in a batch of one.

    The layer's number of experts is lowered to `most`. `shortlist` of the result is that of the first sequence.
    """
    assert isinstance(budget.experts, tuple)
    most = jnp.minimum(most, jnp.asarray(budget.experts, jnp.int32)[layer])
    trees, size = nodes.depth.shape

    def one(nodes: Nodes, probabilities: Array, natural: Routing, valid: Array) -> Restricted:
        alone = jax.tree.map(lambda leaf: leaf[None], nodes)._replace(acceptance_by_depth=nodes.acceptance_by_depth)
        return restrict_to(budget, alone, norm_topk_prob, most, probabilities, natural, valid)

    by_tree = partial(jax.tree.map, lambda leaf: leaf.reshape(trees, size, *leaf.shape[1:]))
    axes = (Nodes(0, 0, 0, None), 0, 0, 0)  # pyright: ignore[reportArgumentType]
    found: Restricted = jax.vmap(one, axes)(nodes, by_tree(probabilities), by_tree(natural), by_tree(valid))
    routing = jax.tree.map(lambda leaf: leaf.reshape(trees * size, *leaf.shape[2:]), found.routing)
    return Restricted(
        routing=dataclasses.replace(routing, max_distinct=None),
        shortlist=found.shortlist[0],
        mass_kept=pmean(jnp.mean(found.mass_kept), data_axes()),
        replaced=found.replaced.reshape(-1),
        kept=found.kept.reshape(-1),
    )


def restrict_alone(
    budget: BudgetConfig, nodes: Nodes, norm_topk_prob: bool, layer: int | Array,
    probabilities: Array, natural: Routing, valid: Array,
) -> Restricted:  # fmt: skip
    """Restrict a layer by `restrict_each`, with the budget's own number of experts."""
    every = jnp.int32(probabilities.shape[-1])
    return restrict_each(every, budget, nodes, norm_topk_prob, layer, probabilities, natural, valid)


def log_probabilities(
    target: Autoregressive, params: Decoder, texts: Int[Array, "texts tokens"]
) -> Float[Array, "texts positions vocab"]:
    """Compute the exact target's log-probabilities after every token but the last, in one forward pass."""
    hidden, _ = plain_pass(target.config, target.backend, params, texts[:, :-1])
    return jax.nn.log_softmax(unembed(params, hidden), axis=-1)


def _restricted(info: ForwardInfo) -> list[Restricted]:
    return [router.restricted for router in info.routers if router.restricted is not None]


def _distinct(selected: Bool[Array, "layers texts experts"]) -> Float[Array, " texts"]:
    """Count the distinct experts of each text, mean over layers."""
    return jnp.mean(jnp.sum(selected, axis=2, dtype=jnp.float32), axis=0)
