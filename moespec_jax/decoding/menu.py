"""Decoding by a menu of shapes: every round is plain or drafts one of a few trees, as `choice.py` decides.

Each shape is a method of its own, compiled by itself, and all share one state. A shape's `step` runs rounds until
another shape is chosen; then the runtime calls that one. The text does not depend on the shapes (`accept.accept_own`).
"""

import dataclasses
from functools import partial
from typing import Generic

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.choice import Choice, after_round, expected_gains, first_choice
from moespec_jax.decoding.drafter import DraftState, SpeculationState, SpeculativeParams, Weights
from moespec_jax.decoding.method import run_rounds
from moespec_jax.decoding.round_info import RoundInfo, RunInfo, no_tree_rounds, tree_round_info
from moespec_jax.decoding.speculative import (
    DraftedPrefill,
    SpeculationPrefill,
    Speculative,
    accept_trees,
    append_path,
)
from moespec_jax.decoding.state_specs import choice_specs, expected_specs
from moespec_jax.decoding.states import DecodeState, Prompts, any_unfinished
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.summary import summary
from moespec_jax.parallel.collectives import data_axes, psum


@struct.dataclass
class MenuState(Generic[DraftState]):
    """A batch of sequences under way, and what is known of the shapes."""

    speculation: SpeculationState[DraftState]
    choice: Choice

    __repr__ = summary


@dataclasses.dataclass(frozen=True)
class Menu(Generic[Weights, DraftState]):
    """Plain decoding and some trees of one drafter (`method.Method`).

    Fields:
        trees: speculative decoding by each tree.
    """

    trees: tuple[Speculative[Weights, DraftState], ...]

    @property
    def prefill(self) -> DraftedPrefill[Weights, DraftState]:
        """Prompts are read by target and drafter."""
        return self.trees[0].prefill

    @property
    def margin(self) -> int:
        """Cache slots that a round of any shape may write behind a sequence's last token."""
        return max(tree.margin for tree in self.trees)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the shapes, plain decoding first."""
        return ("plain", *(method.tree.name for method in self.trees))

    @property
    def parts(self) -> "tuple[Shape[Weights, DraftState], ...]":
        """The shapes, plain decoding first."""
        exact = dataclasses.replace(self.trees[0], budget=None)
        return (Shape(exact, 0), *(Shape(method, 1 + i) for i, method in enumerate(self.trees)))

    def part(self, state: MenuState[DraftState]) -> Int[Array, ""]:
        """Index of the shape of the next round."""
        return state.choice.current

    def begin(
        self, params: SpeculativeParams[Weights], state: SpeculationPrefill[DraftState], prompts: Prompts
    ) -> MenuState[DraftState]:
        """Draw every sequence's first token. All shapes cost the same until `price`."""
        longest = max((method.tree for method in self.trees), key=lambda tree: tree.longest_path)
        widest = dataclasses.replace(self.trees[0], tree=longest)
        equal = jnp.ones((len(self.names),), jnp.float32)
        return MenuState(widest.begin(params, state, prompts), first_choice(equal, equal))

    def price(
        self,
        params: SpeculativeParams[Weights],
        state: MenuState[DraftState],
        costs: Float[Array, " shapes"],
        gains: Float[Array, " shapes"],
    ) -> MenuState[DraftState]:
        """Begin to choose by the seconds of a round of each shape, and the tokens that it is expected to gain."""
        return dataclasses.replace(state, choice=first_choice(costs, gains))

    def step(
        self, params: SpeculativeParams[Weights], state: MenuState[DraftState], rounds: Int[Array, ""]
    ) -> tuple[MenuState[DraftState], RunInfo]:
        """Run rounds of the first shape; the runtime calls the chosen one's."""
        return self.parts[0].step(params, state, rounds)

    def kept(self, state: MenuState[DraftState]) -> Int[Array, " batch"]:
        """Tokens that target and drafter both hold."""
        return self.trees[0].kept(state.speculation)

    def resume(
        self, params: SpeculativeParams[Weights], state: MenuState[DraftState]
    ) -> SpeculationPrefill[DraftState]:
        """Keep the caches."""
        return self.trees[0].resume(params, state.speculation)

    def sequences(self, state: MenuState[DraftState]) -> DecodeState:
        """Sequences as in plain decoding."""
        return state.speculation.decoding

    def specs(self, params: SpeculativeParams[Weights]) -> tuple[MenuState[DraftState], RunInfo]:
        """Sharding of the results of `step` on a mesh."""
        return self.parts[0].specs(params)


@dataclasses.dataclass(frozen=True)
class Shape(Generic[Weights, DraftState]):
    """Rounds of one shape of a menu: of plain decoding, index 0, or of a tree.

    Fields:
        method: speculative decoding by the tree; for plain decoding, of any tree.
        index: place in the menu.
    """

    method: Speculative[Weights, DraftState]
    index: int

    def step(
        self, params: SpeculativeParams[Weights], state: MenuState[DraftState], rounds: Int[Array, ""]
    ) -> tuple[MenuState[DraftState], RunInfo]:
        """Run up to `rounds` rounds, one at least, until another shape is chosen."""
        batch, tree = len(state.speculation.decoding.length), self.method.tree
        size, path = (tree.size, tree.longest_path) if self.index else (1, 1)
        start = no_tree_rounds(self.method.target.config, size, path, self.method.budget, batch)
        start = _with_expected(start, jnp.float32(0.0))

        def proceeds(state: MenuState[DraftState], done: Int[Array, ""]) -> Array:
            chosen = (state.choice.current == self.index) | (done == 0)
            return chosen & any_unfinished(state.speculation.decoding)

        shards = params.target.sharding.experts
        return run_rounds(partial(self.round, params), proceeds, state, rounds, start, shards)

    def round(
        self, params: SpeculativeParams[Weights], state: MenuState[DraftState]
    ) -> tuple[MenuState[DraftState], RoundInfo]:
        """Run one round, and choose the next one's shape."""
        run = self.method.round if self.index else partial(plain_round, self.method)
        speculation, info = run(params, state.speculation)
        assert info.accepted is not None
        gained = psum(jnp.sum(jnp.where(info.active, info.accepted.count, 0), dtype=jnp.float32), data_axes())
        active = psum(jnp.sum(info.active, dtype=jnp.float32), data_axes())
        choice = after_round(state.choice, self.index, gained / jnp.maximum(active, 1.0))
        return MenuState(speculation, choice), info._replace(expected=expected_gains(state.choice)[self.index])

    def specs(self, params: SpeculativeParams[Weights]) -> tuple[MenuState[DraftState], RunInfo]:
        """Sharding of the results of `step` on a mesh."""
        speculation, info = self.method.specs(params)
        return MenuState(speculation, choice_specs()), _with_expected(info, expected_specs())


def plain_round(
    method: Speculative[Weights, DraftState],
    params: SpeculativeParams[Weights],
    state: SpeculationState[DraftState],
) -> tuple[SpeculationState[DraftState], RoundInfo]:
    """Run a round of plain decoding within speculation: a tree of the root alone. The drafter keeps the target's hidden
    states of the newest tokens, and reads them when it drafts again."""
    decoding = state.decoding
    roots = decoding.newest
    trees = Tree(roots, jnp.full_like(roots, -1), jnp.zeros(roots.shape, jnp.float32))
    root_alone = dataclasses.replace(method, accept=accept_rule(method.target.sampling, 1))
    outputs, cache, info = root_alone.verify_to_accept(params, state, trees)
    accepted = accept_trees(root_alone.accept, decoding, trees, outputs, None)
    round_info = tree_round_info(method.target.config, ~decoding.done, trees, accepted, info)
    draft = method.drafter.skip(state.draft, decoding.length - 1, info.aux_hidden_states)
    new = append_path(dataclasses.replace(decoding, cache=cache), trees, accepted, outputs)
    return dataclasses.replace(state, decoding=new, draft=draft), round_info


def _with_expected(info: RunInfo, expected: Array) -> RunInfo:
    assert info.last is not None
    return info._replace(last=info.last._replace(expected=expected))
