"""Speculative decoding: every round drafts a tree, verifies it in one forward pass of the target, accepts a path and
keeps its cache rows. A round is a pure function of parameters and state; drafting, acceptance, the verifying forward
pass and the budget's restriction are fields that can be replaced.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import Accept, Accepted, BestTokenAccept, cut_path
from moespec_jax.decoding.autoregressive import Autoregressive, TargetPrefill
from moespec_jax.decoding.budget import RestrictTree, restrict
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.budget_rules import Nodes
from moespec_jax.decoding.drafter import (
    BlockDrafter,
    Drafter,
    DraftState,
    ResumableDrafter,
    SpeculationState,
    SpeculativeParams,
    Weights,
)
from moespec_jax.decoding.method import run_rounds
from moespec_jax.decoding.round_info import RoundInfo, RunInfo, committed_depths, no_tree_rounds, tree_round_info
from moespec_jax.decoding.sampling import sequence_keys
from moespec_jax.decoding.state_specs import depth_count_specs, prefill_state_specs, tree_run_info_specs
from moespec_jax.decoding.states import NO_TOKEN, DecodeState, PrefillState, Prompts, any_unfinished, append_tokens
from moespec_jax.decoding.tree import Tree, ancestors, depths
from moespec_jax.nn.attention import tree_mask
from moespec_jax.nn.best_tokens import BestTokens, highest_logit, logits_or_best
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.decoder import ForwardInfo, forward, unembed
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import data_axes, psum

# `decoder.forward`, or a function of its signature.
TargetForward = Callable[..., tuple[Array, Cache | None, ForwardInfo]]


@struct.dataclass
class SpeculationPrefill(Generic[DraftState]):
    """State that one chunk of a prompt leaves to the next: the target's and the drafter's."""

    target: PrefillState
    draft: DraftState

    __repr__ = summary


@dataclasses.dataclass(frozen=True)
class DraftedPrefill(Generic[Weights, DraftState]):
    """Prompts read by target and drafter (`method.Prefill`)."""

    target: TargetPrefill
    drafter: Drafter[Weights, DraftState]
    lookahead: int = 1

    def init(self, params: SpeculativeParams[Weights], batch: int, slots: int) -> SpeculationPrefill[DraftState]:
        """Allocate empty caches."""
        target = self.target.init(params.target, batch, slots)
        return SpeculationPrefill(target, self.drafter.init(params, batch, slots))

    def read(
        self,
        params: SpeculativeParams[Weights],
        state: SpeculationPrefill[DraftState],
        tokens: Int[Array, "batch chunk_and_one"],
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
    ) -> SpeculationPrefill[DraftState]:
        """Read one chunk of every prompt with the target, then with the drafter."""
        boundaries, chunk, next_tokens = self.drafter.boundaries, tokens[:, :-1], tokens[:, 1:]
        target, aux = self.target.read_with_aux(params.target, state.target, chunk, start, prompt_lengths, boundaries)
        return SpeculationPrefill(
            target, self.drafter.read(params, state.draft, next_tokens, aux, start, prompt_lengths)
        )

    def specs(self, params: SpeculativeParams[Weights]) -> SpeculationPrefill[DraftState]:
        """Sharding of the state on a mesh."""
        return SpeculationPrefill(prefill_state_specs(params.target), self.drafter.specs(params))


@dataclasses.dataclass(frozen=True)
class Speculative(Generic[Weights, DraftState]):
    """Speculative decoding (`method.Method`). Functions are compared by identity: keep one for all calls.

    Fields:
        target: plain decoding with the target, which draws the first token.
        drafter: proposes a tree for every sequence.
        tree: shape of the trees.
        accept: acceptance of one sequence's tree.
        budget: expert budget of the verification, resolved for the target; None verifies exactly.
        target_forward: forward pass that verifies.
        restrict: limits the experts of a layer where there is a budget.
    """

    target: Autoregressive
    drafter: Drafter[Weights, DraftState]
    tree: TreeConfig
    accept: Accept
    budget: BudgetConfig | None = None
    target_forward: TargetForward = forward
    restrict: RestrictTree = restrict

    @property
    def prefill(self) -> DraftedPrefill[Weights, DraftState]:
        """Prompts are read by target and drafter, alike for all trees, budgets and ways of sampling."""
        return DraftedPrefill(self.target.prefill, self.drafter)

    @property
    def margin(self) -> int:
        """Cache slots that a round may write behind a sequence's last token: in the target's or the drafter's cache."""
        rows = self.drafter.rows if isinstance(self.drafter, BlockDrafter) else 0
        return max(self.tree.size, self.tree.depth * self.tree.top_k, self.tree.longest_path, rows) + 1

    def begin(
        self, params: SpeculativeParams[Weights], state: SpeculationPrefill[DraftState], prompts: Prompts
    ) -> SpeculationState[DraftState]:
        """Draw every sequence's first token."""
        decoding = self.target.begin(params.target, state.target, prompts)
        draft = self.drafter.begin(self.tree, state.draft, prompts.lengths)
        return SpeculationState(decoding, draft, prior_depth_counts(self.tree), self.target.sampling)

    def step(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState], rounds: Int[Array, ""]
    ) -> tuple[SpeculationState[DraftState], RunInfo]:
        """Run up to `rounds` rounds for every unfinished sequence."""
        batch, shards = len(state.decoding.length), params.target.sharding.experts
        start = no_tree_rounds(self.target.config, self.tree.size, self.tree.longest_path, self.budget, batch)
        return run_rounds(partial(self.round, params), self._proceeds, state, rounds, start, shards)

    def round(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState]
    ) -> tuple[SpeculationState[DraftState], RoundInfo]:
        """Draft, verify, accept, keep the accepted rows, commit."""
        trees, state = self.propose(params, state)
        decoding = state.decoding
        outputs, cache, info = self.verify_to_accept(params, state, trees)
        accepted = accept_trees(self.accept, decoding, trees, outputs, kept_nodes(self.budget, info, trees))
        state, round_info = self.commit(state, trees, accepted, outputs, cache, info)
        return state, round_info

    def propose(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState]
    ) -> tuple[Tree, SpeculationState[DraftState]]:
        """Draft a tree for every sequence."""
        return self.drafter.propose(self.tree, params, state)

    def verify(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState], trees: Tree
    ) -> tuple[Float[Array, "batch nodes vocab"], Cache, ForwardInfo]:
        """Run the target over every node: its logits, its cache with the nodes' rows behind the committed ones, and its
        intermediate results."""
        hidden, cache, info = self._pass_over(params, state, trees)
        return unembed(params.target, hidden), cache, info

    def verify_to_accept(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState], trees: Tree
    ) -> tuple[Float[Array, "batch nodes vocab"] | BestTokens, Cache, ForwardInfo]:
        """Run `verify`, with best tokens in place of logits where a round needs no more of a sharded vocabulary."""
        hidden, cache, info = self._pass_over(params, state, trees)
        best_suffices = isinstance(self.accept, BestTokenAccept) and self.target.logprobs is None
        return logits_or_best(params.target, hidden, best_suffices=best_suffices), cache, info

    def _pass_over(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState], trees: Tree
    ) -> tuple[Float[Array, "batch nodes model"], Cache, ForwardInfo]:
        """Run the target over every node, without the output head."""
        decoding, config = state.decoding, self.target.config
        cache_length = decoding.length - 1
        ancestor_mask = jax.vmap(ancestors)(trees.parents)
        depth = jax.vmap(depths)(ancestor_mask)
        positions = cache_length[:, None] + depth
        limit = None
        if self.budget is not None:
            acceptance = state.depth_counts / state.depth_counts[0]
            nodes = Nodes(jnp.exp(trees.scores), depth, ancestor_mask, acceptance)
            limit = partial(self.restrict, self.budget, nodes, config.norm_topk_prob)
            if self.restrict is restrict:
                limit = partial(limit, shortlist=self.target.backend.shortlist)
        hidden, cache, info = self.target_forward(
            config,
            params.target,
            trees.tokens,
            positions,
            tree_mask(ancestor_mask, cache_length, decoding.cache.slots),
            dataclasses.replace(decoding.cache, length=cache_length),
            self.target.backend,
            valid=jnp.broadcast_to(~decoding.done[:, None], trees.tokens.shape),
            rope_length=positions + 1,  # of the pass that would read this node in plain decoding
            boundaries=self.drafter.boundaries,
            restrict=limit,
        )
        assert cache is not None
        return hidden, cache, info

    def commit(
        self,
        state: SpeculationState[DraftState],
        trees: Tree,
        accepted: Accepted,
        outputs: Float[Array, "batch nodes vocab"] | BestTokens,
        cache: Cache,
        info: ForwardInfo,
    ) -> tuple[SpeculationState[DraftState], RoundInfo]:
        """Append the accepted tokens, and keep their rows of the verification's cache."""
        decoding = state.decoding
        if self.tree.top_k > 1:  # a chain's accepted rows are where they belong
            keep_rows = self.target.backend.keep_rows
            cache = keep_rows(cache, decoding.length - 1, accepted.path, self.tree.size)
        draft = self.drafter.commit(state.draft, accepted, info.aux_hidden_states)
        round_info = tree_round_info(self.target.config, ~decoding.done, trees, accepted, info)
        committed = committed_depths(accepted, ~decoding.done)
        counts = psum(jnp.sum(committed, axis=0, dtype=jnp.float32), data_axes())
        new = append_path(dataclasses.replace(decoding, cache=cache), trees, accepted, outputs)
        # Longer where other shapes of a menu have longer paths.
        counts = state.depth_counts + jnp.pad(counts, (0, len(state.depth_counts) - len(counts)))
        return dataclasses.replace(state, decoding=new, draft=draft, depth_counts=counts), round_info

    def _proceeds(self, state: SpeculationState[DraftState], rounds: Int[Array, ""]) -> Array:
        return any_unfinished(state.decoding)

    def kept(self, state: SpeculationState[DraftState]) -> Int[Array, " batch"]:
        """Tokens that target and drafter both hold."""
        drafter, kept = self.drafter, self.target.kept(state.decoding)
        return jnp.minimum(kept, drafter.kept(state.draft)) if isinstance(drafter, ResumableDrafter) else kept * 0

    def resume(
        self, params: SpeculativeParams[Weights], state: SpeculationState[DraftState]
    ) -> SpeculationPrefill[DraftState]:
        """Keep the caches."""
        assert isinstance(self.drafter, ResumableDrafter)
        target = self.target.resume(params.target, state.decoding)
        return SpeculationPrefill(target, self.drafter.resume(state.draft))

    def sequences(self, state: SpeculationState[DraftState]) -> DecodeState:
        """Sequences as in plain decoding."""
        return state.decoding

    def specs(self, params: SpeculativeParams[Weights]) -> tuple[SpeculationState[DraftState], RunInfo]:
        """Sharding of the results of `step` on a mesh."""
        decoding = self.target.specs(params.target)[0]
        draft = self.drafter.specs(params)
        state = SpeculationState(decoding, draft, depth_count_specs(), self.target.sampling)
        budgeted = self.budget is not None and self.target.config.num_sparse_layers > 0
        return state, tree_run_info_specs(budget=budgeted)


# Another method made of the same parts: `dataclasses.replace(method, accept=..., target_forward=..., restrict=...)`.
Adapt = Callable[[Speculative], Speculative]


def prior_depth_counts(tree: TreeConfig) -> Float[Array, " path"]:
    """Prior of `SpeculationState.depth_counts`: four pseudo-rounds at acceptance 0.5 per depth."""
    return 4.0 * 0.5 ** jnp.arange(tree.longest_path, dtype=jnp.float32)


def accept_trees(
    accept: Accept,
    decoding: DecodeState,
    trees: Tree,
    outputs: Float[Array, "batch nodes vocab"] | BestTokens,
    kept: Bool[Array, "batch nodes"] | None,
) -> Accepted:
    """Accept a path of every sequence's tree; its bonus token is `NO_TOKEN` where logits on the path are not finite."""
    keys = sequence_keys(decoding.key, len(trees.tokens))
    # Best tokens are given to a `BestTokenAccept` alone.
    accepted = jax.vmap(accept)(trees, outputs, keys, decoding.histories)  # pyright: ignore[reportArgumentType]
    on_path = jax.vmap(lambda rows, path: jax.tree.map(lambda leaf: leaf[path], rows))(outputs, accepted.path)
    finite = jnp.isfinite(jnp.max(highest_logit(on_path), axis=1))
    accepted = dataclasses.replace(accepted, bonus=jnp.where(finite, accepted.bonus, NO_TOKEN))
    return accepted if kept is None else jax.vmap(cut_path)(trees, accepted, kept)


def kept_nodes(budget: BudgetConfig | None, info: ForwardInfo, trees: Tree) -> Bool[Array, "batch nodes"] | None:
    """Mark the nodes that the budget did not prune; None where it prunes none."""
    if budget is None or not budget.prunes or not info.routers:
        return None
    restricted = info.routers[-1].restricted
    assert restricted is not None
    return restricted.kept.reshape(trees.tokens.shape)


def append_path(
    decoding: DecodeState,
    trees: Tree,
    accepted: Accepted,
    outputs: Float[Array, "batch nodes vocab"] | BestTokens,
) -> DecodeState:
    """Append accepted tokens and the bonus token to every unfinished sequence: each was drawn from the logits of the
    node before it."""
    step = jnp.arange(accepted.path.shape[1], dtype=jnp.int32)[None, :]
    path_tokens = jnp.take_along_axis(trees.tokens, accepted.path, axis=1)
    new = jnp.where(step < accepted.count[:, None] - 1, jnp.roll(path_tokens, -1, axis=1), accepted.bonus[:, None])
    if decoding.logprobs is None:
        return append_tokens(decoding, new, accepted.count)
    assert not isinstance(outputs, BestTokens)
    on_path = jnp.take_along_axis(outputs, accepted.path[:, :, None], axis=1)
    return append_tokens(decoding, new, accepted.count, on_path)
