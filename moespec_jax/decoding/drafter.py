"""The contract of a drafter: which tree every sequence proposes in a round, from a state of its own.

A drafter is a frozen value: equal drafters share compiled programs. Its parameters are `SpeculativeParams.draft`, any
pytree, and its state `SpeculationState.draft`, another. A drafter without either is one function, `propose`.
"""

from typing import Generic, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.states import DecodeState
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.summary import summary

Weights = TypeVar("Weights")
DraftState = TypeVar("DraftState")


@struct.dataclass
class SpeculativeParams(Generic[Weights]):
    """Parameters of target and drafter."""

    target: Decoder
    draft: Weights

    __repr__ = summary


@struct.dataclass
class SpeculationState(Generic[DraftState]):
    """A batch of sequences under way.

    Fields:
        decoding: as in plain decoding; the newest token, which is the next tree's root, is not in the cache.
        draft: the drafter's state.
        depth_counts: rounds of all sequences that committed a node of each depth, the root's included.
        sampling: how the target's tokens are drawn. The noise of their draws (`sampling.token_noise`) is known before
            the target's logits are, so that a drafter may draw with it too.
    """

    decoding: DecodeState
    draft: DraftState
    depth_counts: Float[Array, " path"]
    sampling: SamplingConfig = struct.field(pytree_node=False, default=SamplingConfig())

    __repr__ = summary


@runtime_checkable
class Drafter(Protocol[Weights, DraftState]):
    """A way of drafting.

    `init`, `read` and `begin` follow the prompt, `propose` and `commit` every round. Exactness requires of the trees
    only what `tree.Tree` requires: any other error costs acceptance.
    """

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads (`decoder.forward`)."""
        ...

    def init(self, params: SpeculativeParams[Weights], batch: int, slots: int) -> DraftState:
        """Allocate the state of `batch` sequences of up to `slots` tokens."""
        ...

    def read(
        self,
        params: SpeculativeParams[Weights],
        state: DraftState,
        next_tokens: Int[Array, "batch chunk"],
        aux_hidden_states: Float[Array, "batch chunk aux"] | None,
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
    ) -> DraftState:
        """Read the chunk of every prompt that begins at position `start`: the token after each of its tokens, and the
        target's hidden states of its tokens."""
        ...

    def begin(self, tree: TreeConfig, state: DraftState, prompt_lengths: Int[Array, " batch"]) -> DraftState:
        """Turn the state after the prompt into that of rounds with such trees."""
        ...

    def propose(
        self, tree: TreeConfig, params: SpeculativeParams[Weights], state: SpeculationState[DraftState]
    ) -> tuple[Tree, SpeculationState[DraftState]]:
        """Draft a tree `[batch, tree.size]` for every sequence, of paths of at most `tree.longest_path` nodes.

        The target's cache may be written from its first free slot on; verification overwrites the rows.
        """
        ...

    def commit(
        self, state: DraftState, accepted: Accepted, aux_hidden_states: Float[Array, "batch nodes aux"] | None
    ) -> DraftState:
        """Take note of the accepted paths, and of the target's hidden states at all nodes."""
        ...

    def skip(
        self, state: DraftState, position: Int[Array, " batch"], aux_hidden_states: Float[Array, "batch 1 aux"] | None
    ) -> DraftState:
        """Take note of the target's hidden states of the token at `position`, after which one was drawn without a
        draft. Only menus of shapes (`menu.Menu`) call it."""
        ...

    def specs(self, params: SpeculativeParams[Weights]) -> DraftState:
        """Sharding of the state on a mesh, `PartitionSpec`s in place of arrays."""
        ...


@runtime_checkable
class ResumableDrafter(Protocol[DraftState]):
    """A drafter whose state can be read on with (`method.ResumableMethod`)."""

    def kept(self, state: DraftState) -> Int[Array, " batch"]:
        """Number of first tokens of each sequence that the state holds all of; it may be more than there are."""
        ...

    def resume(self, state: DraftState) -> DraftState:
        """Turn the state into that of reading the prompt; `read` may go on anywhere up to `kept`."""
        ...


@runtime_checkable
class BlockDrafter(Protocol):
    """A drafter whose round may write more rows of its cache than its tree has nodes."""

    @property
    def rows(self) -> int:
        """Number of rows that a round may write behind those of the committed tokens."""
        ...


class StatelessDrafter:
    """A drafter without parameters and state; `propose` is left to the subclass."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """No hidden states are read."""
        return ()

    def init(self, params: SpeculativeParams[tuple[()]], batch: int, slots: int) -> tuple[()]:
        """There is no state."""
        return ()

    def read(
        self,
        params: SpeculativeParams[tuple[()]],
        state: tuple[()],
        next_tokens: Array,
        aux_hidden_states: Array | None,
        start: Array,
        prompt_lengths: Array,
    ) -> tuple[()]:
        """There is no state."""
        return ()

    def begin(self, tree: TreeConfig, state: tuple[()], prompt_lengths: Array) -> tuple[()]:
        """There is no state."""
        return ()

    def commit(self, state: tuple[()], accepted: Accepted, aux_hidden_states: Array | None) -> tuple[()]:
        """There is no state."""
        return ()

    def skip(self, state: tuple[()], position: Array, aux_hidden_states: Array | None) -> tuple[()]:
        """There is no state."""
        return ()

    def kept(self, state: tuple[()]) -> Int[Array, "..."]:
        """Everything: there is no state."""
        return jnp.int32(jnp.iinfo(jnp.int32).max)

    def resume(self, state: tuple[()]) -> tuple[()]:
        """There is no state."""
        return ()

    def specs(self, params: SpeculativeParams[tuple[()]]) -> tuple[()]:
        """There is no state."""
        return ()
