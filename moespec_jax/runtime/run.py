"""One batch on its way through the compiled programs: prefill, then decoding, in pieces if it is streamed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moespec_jax.decoding.autoregressive import NO_TOKEN, bucket_lengths
from moespec_jax.decoding.round_info import RoundInfo, SpeculationInfo
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.errors import CheckpointError
from moespec_jax.parallel.mesh import DATA
from moespec_jax.parallel.processes import agreed, fetch
from moespec_jax.runtime.method import Method
from moespec_jax.runtime.programs import Programs

SMALLEST_CACHE = 256
_STREAM_INTERVAL_S = 0.1
_STOP_SLOTS = 8
_SUMS = ("experts_wanted", "experts_read", "experts_slowest", "mass_kept", "replaced")
# Takes each sequence's new token ids, as often as they arrive.
OnTokens = Callable[[list[list[int]]], None]
# Takes what a round did, and its number.
OnRound = Callable[[int, RoundInfo], None]


class Batch(NamedTuple):
    """What is asked of one run: prompts as token ids, the length each sequence may reach, stop ids and seed."""

    prompts: list[list[int]]
    limit: list[int]
    stop_ids: tuple[int, ...]
    seed: int


class Run:
    """One batch on its way through the compiled programs of one model.

    `sequences` are the prompts with what was generated so far; `prefill_s`, `decode_s` exclude compilation, which is
    `compile_s`; `rounds` counts forward passes after prefill, and `sums` adds up over them what `SpeculationInfo` does.
    `active[b]` counts the rounds sequence b took part in, `accepted[b, d]` those that accepted a node of depth d + 1.
    """

    def __init__(self, programs: Programs, method: Method, batch: Batch):
        self._programs, self._method, self._batch = programs, method, batch
        # No id is -1. Padded, so that neither `ignore_eos` nor a few more stop ids compile anything anew.
        stops = [*batch.stop_ids, *[NO_TOKEN] * max(1, _STOP_SLOTS - len(batch.stop_ids))]
        self._stops = programs.put(np.array(stops, np.int32))
        self._compiled_before = programs.compile_s
        self.prefill_s = self.decode_s = 0.0
        self.rounds, self.sums = 0, dict.fromkeys(_SUMS, 0.0)
        self.active = np.zeros(len(batch.prompts), np.int64)
        self.accepted = np.zeros((len(batch.prompts), 0), np.int64)
        self.sequences = batch.prompts

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling for this run."""
        return self._programs.compile_s - self._compiled_before

    def execute(self, on_tokens: OnTokens | None = None, on_round: OnRound | None = None) -> None:
        """Prefill, then decode until every sequence is done; with `on_round`, one round a call.

        Raises:
            CheckpointError: logits are not finite.
        """
        state = self._prefill()
        self._collect(state, on_tokens)
        while not np.all(fetch(self._method.decoding(state).done)):
            limit = 1 if on_round else self._rounds_per_call() if on_tokens else max(self._batch.limit)
            state, info = self._advance(state, limit)
            self._count(info)
            if on_round and isinstance(info, SpeculationInfo):
                on_round(self.rounds - 1, _of_batch(jax.tree.map(fetch, info.last), len(self._batch.prompts)))
            self._collect(state, on_tokens)

    def state_after(self, rounds: int) -> Any:
        """The method's state after prefill and so many rounds: what a round can be run on by itself."""
        state = self._prefill()
        for _ in range(rounds):
            state, _ = self._advance(state, 1)
        return state

    def _advance(self, state: Any, rounds: int) -> tuple[Any, Any]:
        method = self._method
        arguments = state, self._programs.put(np.array(rounds, np.int32))
        return self._timed("decode_s", method.advance, method.settings, *arguments, donate=(1,), specs=method.specs[1:])

    def _rounds_per_call(self) -> int:
        """As many rounds as fit between two looks of a reader; one at first, to learn how long a round takes."""
        return agreed(max(1, int(_STREAM_INTERVAL_S * self.rounds / self.decode_s))) if self.rounds else 1

    def _count(self, info: Any) -> None:
        self.rounds += int(fetch(info.rounds))
        count = len(self._batch.prompts)
        self.active += fetch(info.active)[:count]
        for name in self.sums:
            self.sums[name] += float(fetch(getattr(info, name, np.float32(0.0))))
        if isinstance(info, SpeculationInfo):
            accepted = fetch(info.accepted).astype(np.int64)[:count]
            self.accepted = accepted + (self.accepted if self.accepted.size else 0)

    def _prefill(self) -> Any:
        method, put = self._method, self._programs.put
        prompts, limit = _filled_up(self._batch, self._programs.mesh)
        lengths = np.array([len(p) for p in prompts], np.int32)
        chunks = bucket_lengths(int(lengths.max()))
        longest = max(max(limit) + method.margin, sum(chunks) + method.lookahead)
        slots = max(SMALLEST_CACHE, 1 << (longest - 1).bit_length())
        tokens = np.zeros((len(prompts), slots), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        kind = (method.empty.__qualname__, method.settings, len(prompts), slots)
        prefill = self._programs.make(kind, lambda: method.empty(len(prompts), slots), method.specs[0])
        start, prompt_lengths = 0, put(lengths, BY_SEQUENCE)
        for chunk in chunks:
            part = put(tokens[:, start : start + chunk + method.lookahead], BY_SEQUENCE)
            arguments = (prefill, part, put(np.array(start, np.int32)), prompt_lengths)
            prefill = self._timed(
                "prefill_s", method.read, method.prefill_settings, *arguments, donate=(1,), specs=method.specs[0]
            )
            start += chunk
        ends = put(np.array(limit, np.int32), BY_SEQUENCE)
        rest = (put(tokens, BY_SEQUENCE), prompt_lengths, ends, self._stops, self._programs.key(self._batch.seed))
        return self._timed(
            "prefill_s", method.begin, method.settings, *prefill, *rest, donate=method.donated, specs=method.specs[1]
        )

    def _timed(self, clock: str, function: Callable[..., Any], settings: Any, *arguments: Any, **options: Any) -> Any:
        compiled, started = self._programs.compile_s, time.perf_counter()
        out = self._programs.run(function, settings, self._method.params, *arguments, **options)
        jax.block_until_ready(out)
        spent = time.perf_counter() - started - (self._programs.compile_s - compiled)
        setattr(self, clock, getattr(self, clock) + spent)
        return out

    def _collect(self, state: Any, on_tokens: OnTokens | None) -> None:
        decoding, count = self._method.decoding(state), len(self._batch.prompts)
        tokens, length = fetch(decoding.tokens)[:count], fetch(decoding.length)[:count]
        sequences = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
        if any(NO_TOKEN in new[len(old) :] for new, old in zip(sequences, self.sequences, strict=True)):
            raise CheckpointError(
                "expected finite logits; came NaN or infinity, from weights that are not finite (named by python -m"
                " convert.check --files) or from values too large for this dtype"
            )
        if on_tokens:
            on_tokens([new[len(old) :] for new, old in zip(sequences, self.sequences, strict=True)])
        self.sequences = sequences


def _filled_up(batch: Batch, mesh: Mesh | None) -> tuple[list[list[int]], list[int]]:
    """Prompts and limits, filled up with sequences that have ended to what a mesh's `data` axis divides."""
    missing = 0 if mesh is None else -len(batch.prompts) % mesh.shape[DATA]
    return [*batch.prompts, *[[0]] * missing], [*batch.limit, *[1] * missing]


def _of_batch(info: RoundInfo, count: int) -> RoundInfo:
    """Without the sequences that a batch was filled up with."""
    tree, accepted = (jax.tree.map(lambda x: x[:count], part) for part in (info.tree, info.accepted))
    wanted, read = info.wanted[:, :count], info.read[:, :count]
    return RoundInfo(info.active[:count], tree, accepted, wanted, read, info.budget)
