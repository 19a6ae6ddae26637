"""One batch through the compiled programs: prefill, then decoding, a few rounds a call where it is streamed."""

import operator
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar, TypeVarTuple

import jax
import numpy as np

from moespec_jax.decoding.autoregressive import bucket_lengths
from moespec_jax.decoding.method import Method, MethodOfParts, Params, PrefillState, ResumableMethod, State
from moespec_jax.decoding.round_info import RoundInfo, RunInfo
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.states import Prompts
from moespec_jax.parallel.processes import broadcast_from_first, fetch
from moespec_jax.runtime.padding import in_rows, padded, stop_slots, without_padding
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.prompt_cache import PromptCache, Resumed
from moespec_jax.runtime.samples import Repetition, repeat_rows, rows_of_one_read
from moespec_jax.runtime.sequences import fetch_logprobs, fetch_sequences

SMALLEST_CACHE = 256
_STREAM_INTERVAL_S = 0.1
# Rounds of a rehearsal after the first one, which takes longest, and about the most seconds for them.
_SETTLING_ROUNDS, _SETTLING_S = 16, 0.25

Result = TypeVar("Result")
InputState = TypeVar("InputState")
Arguments = TypeVarTuple("Arguments")
# Called with each sequence's new token ids.
OnTokens = Callable[[list[list[int]]], None]
# Called with the number of a round and its measurements.
OnRound = Callable[[int, RoundInfo], None]


class Advanced(NamedTuple):
    """A few rounds of one part of a method.

    Fields:
        rounds: their number.
        seconds: of all of them.
        gained: tokens that a sequence gained in a round, on average.
    """

    rounds: int
    seconds: float
    gained: float


AnyState = TypeVar("AnyState")
# Runs up to some rounds of a part of the method: (state, part, rounds) -> (state, what was run).
Advance = Callable[[AnyState, int, int], tuple[AnyState, Advanced]]


class Batch(NamedTuple):
    """Input of one run.

    Fields:
        prompts: token ids.
        limit: length that each sequence may reach.
        stop_ids: token ids that end a sequence.
        seed: of all random draws; those of a sequence depend on its place in `prompts`, too.
        samples: of each prompt; so many equal ones follow each other in `prompts`, and are read once.
    """

    prompts: list[list[int]]
    limit: list[int]
    stop_ids: tuple[int, ...]
    seed: int
    samples: int = 1


class Run(Generic[Params, PrefillState, State]):
    """One batch through the compiled programs of one model.

    Fields:
        sequences: prompts with everything generated so far.
        prefill_s, decode_s: seconds without compilation and first executions.
        rounds: the target's forward passes after prefill.
        sums: sums over rounds of the scalar measurements of `RunInfo` and `BudgetSums`.
        active: rounds that each sequence took part in.
        accepted: `accepted[b, d]` counts the rounds of sequence b that committed a node of depth d + 1.
        rounds_of: rounds of each part of the method; it has one part, itself, unless it is a menu.
        logprobs: of the sequences, if the method records them.
    """

    def __init__(
        self,
        programs: Programs,
        method: Method[Params, PrefillState, State],
        params: Params,
        batch: Batch,
        cache: PromptCache | None = None,
    ) -> None:
        self._programs, self._method, self._params, self._batch = programs, method, params, batch
        self._call = programs.run
        self._parts = method.parts if isinstance(method, MethodOfParts) else (method,)
        self.rounds_of = [0] * len(self._parts)
        self._prompts, self._limit = padded(batch.prompts, batch.limit, programs.mesh)
        self._shared = rows_of_one_read(len(batch.prompts), batch.samples, programs.mesh)
        self._cache, self._resumed = cache, None
        self._lay_out(0)
        read = batch.prompts[:: self._shared]
        if cache is not None and (resumed := cache.take(method.prefill, read)) is not None:
            self._lay_out(resumed.start)
            if resumed.slots >= self._slots:
                self._resumed, self._slots = resumed, resumed.slots
            else:
                self._lay_out(0)
        self._stops = programs.put(stop_slots(batch.stop_ids))
        self._compiled_before, self._rehearsal_s = programs.compile_s, 0.0
        self.prefill_s = self.decode_s = 0.0
        self.rounds = 0
        self.sums: dict[str, float] = {}
        self.active = np.zeros(len(batch.prompts), np.int64)
        self.accepted = np.zeros((len(batch.prompts), 0), np.int64)
        self.sequences, self.logprobs = batch.prompts, None

    def _lay_out(self, start: int) -> None:
        """Choose chunks that read the prompts from `start` on, and the capacity of the buffers."""
        method, self._chunks = self._method, bucket_lengths(max(map(len, self._batch.prompts)) - start)
        longest = max(max(self._batch.limit) + method.margin, start + sum(self._chunks) + method.prefill.lookahead)
        self._slots = max(SMALLEST_CACHE, 1 << (longest - 1).bit_length())

    @property
    def cached_tokens(self) -> int:
        """Tokens of every prompt that were in the prompt cache, and were not read."""
        return 0 if self._resumed is None else self._resumed.start

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling for this run, first executions of programs included."""
        return self._programs.compile_s - self._compiled_before + self._rehearsal_s

    def execute(
        self,
        on_tokens: OnTokens | None = None,
        on_round: OnRound | None = None,
        prepare: Callable[[Advance[State], State], State] | None = None,
        is_ended: Callable[[], bool] = lambda: False,
        first_parts: Sequence[int] | None = None,
    ) -> None:
        """Prefill, then decode until every sequence is done; with `on_round`, one round a call.

        `prepare(advance, state)` may change the state before the first round, and run rounds itself. Where `is_ended()`
        is true after a call, no further one is made. Programs of `first_parts` (default: of all parts of the method)
        are compiled and executed before the clocks start, others when they are first chosen.

        Raises:
            CheckpointError: logits are not finite.
        """
        self._rehearse(range(len(self._parts)) if first_parts is None else first_parts)
        state = self._prefill(self._chunks, self._resumed)
        self._collect(state, on_tokens)

        def advance(state: State, part: int, rounds: int) -> tuple[State, Advanced]:
            seconds, before, active, tokens = self.decode_s, self.rounds, self.active.sum(), self._tokens()
            for _ in range(rounds if on_round else 1):
                state, info = self._step(state, 1 if on_round else rounds, part)
                self._count(info, part)
                if on_round and info.last is not None and int(fetch(info.rounds)):
                    on_round(self.rounds - 1, without_padding(info.last, len(self._batch.prompts)))
            self._collect(state, on_tokens)
            gained = (self._tokens() - tokens) / max(int(self.active.sum() - active), 1)
            return state, Advanced(self.rounds - before, self.decode_s - seconds, gained)

        state = state if prepare is None else prepare(advance, state)
        while not self.is_done(state) and not is_ended():
            limit = 1 if on_round else self._rounds_per_call() if on_tokens else max(self._batch.limit)
            state, _ = advance(state, self._part(state), limit)
        self.logprobs = fetch_logprobs(self._method.sequences(state))
        self._keep(state)

    def _tokens(self) -> int:
        return sum(map(len, self.sequences))

    def is_done(self, state: State) -> bool:
        """Test whether every sequence is done."""
        return bool(np.all(fetch(self._method.sequences(state).done)))

    def _part(self, state: State) -> int:
        """Index of the part that runs the next rounds."""
        return int(fetch(self._method.part(state))) if isinstance(self._method, MethodOfParts) else 0

    def _keep(self, state: State) -> None:
        """Put the state into the prompt cache."""
        method, programs = self._method, self._programs
        if self._cache is None or not isinstance(method, ResumableMethod):
            return
        kept = np.minimum(fetch(method.kept(state)), fetch(method.sequences(state).length))
        if kept.min() < 1:
            return
        specs = None if programs.mesh is None else method.prefill.specs(self._params)
        read = programs.run(type(method).resume, method, self._params, state, donate=True, specs=specs)
        sequences = [ids[:count] for ids, count in zip(self.sequences, kept, strict=False)]
        self._cache.keep(method.prefill, read, self._slots, sequences)

    def state_after(self, rounds: int) -> State:
        """Prefill, and run so many rounds: a state on which a round can be run by itself."""
        state = self._prefill(self._chunks)
        for _ in range(rounds):
            state, _ = self._step(state, 1, self._part(state))
        return state

    def _rehearse(self, parts: Sequence[int]) -> None:
        """Execute every new program of these parts once before the clocks start, since a first execution is slower; the
        state is freed before that of the run is made. A chunk of each length is read."""
        chunks = list(dict.fromkeys(self._chunks))
        decodes = max(map(operator.sub, self._limit, map(len, self._prompts))) > 1
        shapes = (len(self._prompts), self._shared, self._slots)
        keys: set[Hashable] = {(self._method.prefill, chunk, shapes) for chunk in chunks}
        keys |= {(self._method, "begin", shapes)}
        keys |= {(part, "step", shapes) for part in (self._parts[i] for i in parts if decodes)}
        # Processes agree, although each frees programs by itself.
        if broadcast_from_first(int(self._programs.all_executed(keys))):
            return
        compiled, started = self._programs.compile_s, time.perf_counter()
        with self._programs.rehearsal():
            if self._programs.mesh is None:
                self._prepare(chunks, parts if decodes else ())
            state = self._prefill(chunks)
            if decodes:
                self._settle(state, parts)
        self._rehearsal_s = time.perf_counter() - started - (self._programs.compile_s - compiled)
        self.prefill_s = self.decode_s = 0.0

    def _prepare(self, chunks: Sequence[int], parts: Sequence[int]) -> None:
        """Begin to compile every program: while XLA compiles one, or loads it from a cache, the next one is traced."""
        self._call = self._programs.prepare
        state = self._prefill(chunks)
        for part in parts:
            state, _ = self._step(state, 1, part)
        self._call = self._programs.run

    def _settle(self, state: State, parts: Sequence[int]) -> None:
        """Decode a few rounds: on CPU each expert of a layer has its own first execution, and a round reads few."""
        for part in parts:
            state, _ = self._step(state, 1, part)
            end = time.perf_counter() + _SETTLING_S
            for _ in range(_SETTLING_ROUNDS):
                if not broadcast_from_first(int(time.perf_counter() < end)):
                    break
                state, _ = self._step(state, 1, part)

    def _prefill(self, chunks: Sequence[int], resumed: Resumed | None = None) -> State:
        """Read chunks of the prompts, and draw the first tokens."""
        prefill, programs, prompts, slots = self._method.prefill, self._programs, self._prompts, self._slots
        tokens, lengths = in_rows(prompts, slots)
        read, read_lengths = tokens[:: self._shared], programs.put(lengths[:: self._shared], BY_SEQUENCE)
        specs, batch, start = None if programs.mesh is None else prefill.specs(self._params), len(read), 0
        if resumed is None:
            state = programs.make((prefill, batch, slots), lambda: prefill.init(self._params, batch, slots), specs)
        else:
            state, start = resumed.state, resumed.start
        for chunk in chunks:
            part = programs.put(read[:, start : start + chunk + prefill.lookahead], BY_SEQUENCE)
            at = programs.put(np.array(start, np.int32))
            state = self._timed("prefill_s", type(prefill).read, prefill, state, part, at, read_lengths, specs=specs)
            start += chunk
        if self._shared > 1:
            repetition = Repetition(prefill, self._shared)
            state = self._timed("prefill_s", repeat_rows, repetition, state, specs=specs)
        tokens, lengths, ends = (
            programs.put(array, BY_SEQUENCE) for array in (tokens, lengths, np.array(self._limit, np.int32))
        )
        given = Prompts(tokens, lengths, ends, self._stops, programs.key(self._batch.seed))
        method, specs = self._method, None if programs.mesh is None else self._method.specs(self._params)
        return self._timed("prefill_s", type(method).begin, method, state, given, specs=specs and specs[0])

    def _step(self, state: State, rounds: int, part: int) -> tuple[State, RunInfo]:
        method, limit = self._parts[part], self._programs.put(np.array(rounds, np.int32))
        specs = None if self._programs.mesh is None else method.specs(self._params)
        return self._timed("decode_s", type(method).step, method, state, limit, specs=specs)

    def _timed(
        self,
        clock: str,
        function: Callable[[InputState, Params, *Arguments], Result],
        settings: InputState,
        *arguments: *Arguments,
        specs: Result | None,
    ) -> Result:
        """Run a program, donating its state, and add the seconds to a clock."""
        compiled, started = self._programs.compile_s, time.perf_counter()
        out = self._call(function, settings, self._params, *arguments, donate=True, specs=specs)
        jax.block_until_ready(out)
        spent = time.perf_counter() - started - (self._programs.compile_s - compiled)
        setattr(self, clock, getattr(self, clock) + spent)
        return out

    def _rounds_per_call(self) -> int:
        """As many rounds as fit into the streaming interval; one at first, to measure a round."""
        if not self.rounds:
            return 1
        return broadcast_from_first(max(1, int(_STREAM_INTERVAL_S * self.rounds / self.decode_s)))

    def _count(self, info: RunInfo, part: int) -> None:
        rounds = int(fetch(info.rounds))
        self.rounds += rounds
        self.rounds_of[part] += rounds
        count = len(self._batch.prompts)
        self.active += fetch(info.active)[:count]
        sums = {"experts_wanted": info.experts_wanted, "experts_max_per_device": info.experts_max_per_device}
        if info.budget is not None:
            sums |= info.budget._asdict()
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(fetch(value))
        if info.accepted is not None:
            accepted = fetch(info.accepted).astype(np.int64)[:count]
            longest = max(accepted.shape[1], self.accepted.shape[1])
            accepted, before = (np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in (accepted, self.accepted))
            self.accepted = before + accepted

    def _collect(self, state: State, on_tokens: OnTokens | None) -> None:
        sequences = fetch_sequences(self._method.sequences(state), len(self._batch.prompts))
        if on_tokens:
            on_tokens([new[len(old) :] for new, old in zip(sequences, self.sequences, strict=True)])
        self.sequences = sequences
