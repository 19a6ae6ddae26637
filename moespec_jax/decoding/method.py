"""The contract of a way of decoding: pure functions of parameters and a state, which the runtime compiles and calls.

`runtime.run.Run` prefills with `Method.prefill`, draws the first token with `begin`, and advances with `step` until
every sequence is done. Methods are frozen values: equal methods share compiled programs. The state that a function
takes is donated to its program, and is not used again.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Int

from moespec_jax.decoding.round_info import RoundInfo, RunInfo, add_round
from moespec_jax.decoding.states import DecodeState, Prompts

Params = TypeVar("Params", contravariant=True)
# States of prefill and of decoding: pytrees of arrays, or of their `PartitionSpec`s.
PrefillState = TypeVar("PrefillState")
State = TypeVar("State")
AnyState = TypeVar("AnyState")
ReadState = TypeVar("ReadState", covariant=True)
EndState = TypeVar("EndState", contravariant=True)


@runtime_checkable
class Prefill(Protocol[Params, PrefillState]):
    """A way of reading prompts. It is a value of its own, so that methods that read prompts alike share programs."""

    @property
    def lookahead(self) -> int:
        """Number of tokens that `read` takes beyond its chunk."""
        ...

    def init(self, params: Params, batch: int, slots: int) -> PrefillState:
        """Allocate the state of `batch` sequences of up to `slots` tokens."""
        ...

    def read(
        self,
        params: Params,
        state: PrefillState,
        tokens: Int[Array, "batch chunk_and_lookahead"],
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
    ) -> PrefillState:
        """Read the chunk of every prompt that begins at position `start`; tokens past a prompt's end are padding."""
        ...

    def specs(self, params: Params) -> PrefillState:
        """Sharding of the state on a mesh."""
        ...


@runtime_checkable
class Method(Protocol[Params, PrefillState, State]):
    """A way of decoding."""

    @property
    def prefill(self) -> Prefill[Params, PrefillState]:
        """How prompts are read."""
        ...

    @property
    def margin(self) -> int:
        """Number of cache slots that a round may write behind a sequence's last token."""
        ...

    def begin(self, params: Params, state: PrefillState, prompts: Prompts) -> State:
        """Draw every sequence's first token from the state after its prompt."""
        ...

    def step(self, params: Params, state: State, rounds: Int[Array, ""]) -> tuple[State, RunInfo]:
        """Run up to `rounds` rounds for every unfinished sequence."""
        ...

    def sequences(self, state: State) -> DecodeState:
        """Sequences within the state."""
        ...

    def specs(self, params: Params) -> tuple[State, RunInfo]:
        """Sharding of the results of `step` on a mesh."""
        ...


@runtime_checkable
class ResumableMethod(Protocol[Params, ReadState, EndState]):
    """A way of decoding after whose rounds prefill can go on with further tokens of the same sequences."""

    def kept(self, state: EndState) -> Int[Array, " batch"]:
        """Number of first tokens of each sequence that the state holds all of."""
        ...

    def resume(self, params: Params, state: EndState) -> ReadState:
        """Turn the state into that of prefill; `Prefill.read` may go on anywhere up to `kept`."""
        ...


@runtime_checkable
class MethodOfParts(Protocol[Params, PrefillState, State]):
    """A way of decoding made of others that share its state, of which one runs the next rounds."""

    @property
    def parts(self) -> "tuple[Method[Params, PrefillState, State], ...]":
        """The ways of decoding; of them, `step` and `specs` are used."""
        ...

    def part(self, state: State) -> Int[Array, ""]:
        """Index of the one that runs the next rounds."""
        ...


def run_rounds(
    run_round: Callable[[AnyState], tuple[AnyState, RoundInfo]],
    proceeds: Callable[[AnyState, Int[Array, ""]], Array],
    state: AnyState,
    rounds: Int[Array, ""],
    no_rounds: RunInfo,
    shards: int,
) -> tuple[AnyState, RunInfo]:
    """Repeat a round in one `lax.while_loop`, up to `rounds` times, while `proceeds(state, rounds so far)`.

    `rounds` is traced, so that streaming runs the same program for a few rounds at a time. `no_rounds` starts the sums;
    a layer's experts are in `shards` shards.
    """

    def unfinished(carry: tuple[AnyState, RunInfo]) -> Array:
        return (carry[1].rounds < rounds) & proceeds(carry[0], carry[1].rounds)

    def body(carry: tuple[AnyState, RunInfo]) -> tuple[AnyState, RunInfo]:
        state, last = run_round(carry[0])
        return state, add_round(carry[1], last, shards)

    return jax.lax.while_loop(unfinished, body, (state, no_rounds))
