"""One batch on its way through the compiled programs: prefill, then decoding, in pieces if it is streamed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.decode import bucket_lengths
from moespec_jax.method import Method
from moespec_jax.programs import Programs
from moespec_jax.rounds import RoundInfo, SpeculationInfo

SMALLEST_CACHE = 256
_STREAM_INTERVAL_S = 0.1
_STOP_SLOTS = 8
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
        self._stops = jnp.asarray([*batch.stop_ids, *[-1] * (_STOP_SLOTS - len(batch.stop_ids))], jnp.int32)
        self._compiled_before = programs.compile_s
        self.prefill_s = self.decode_s = 0.0
        self.rounds, self.sums = 0, dict.fromkeys(("experts_wanted", "experts_read", "mass_kept", "replaced"), 0.0)
        self.active = np.zeros(len(batch.prompts), np.int64)
        self.accepted = np.zeros((len(batch.prompts), 0), np.int64)
        self.sequences = batch.prompts

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling for this run."""
        return self._programs.compile_s - self._compiled_before

    def execute(self, on_tokens: OnTokens | None = None, on_round: OnRound | None = None) -> None:
        """Prefill, then decode until every sequence is done; with `on_round`, one round a call."""
        state = self._prefill()
        self._collect(state, on_tokens)
        while not bool(jnp.all(self._method.decoding(state).done)):
            limit = 1 if on_round else self._rounds_per_call() if on_tokens else max(self._batch.limit)
            state, info = self._timed(
                "decode_s", self._method.advance, self._method.settings, state, jnp.int32(limit), donate=(1,)
            )
            self._count(info)
            if on_round and isinstance(info, SpeculationInfo):
                on_round(self.rounds - 1, jax.tree.map(np.asarray, info.last))
            self._collect(state, on_tokens)

    def state_after(self, rounds: int) -> Any:
        """The method's state after prefill and so many rounds: what a round can be run on by itself."""
        state = self._prefill()
        for _ in range(rounds):
            advance, settings = self._method.advance, self._method.settings
            state, _ = self._timed("decode_s", advance, settings, state, jnp.int32(1), donate=(1,))
        return state

    def _rounds_per_call(self) -> int:
        """As many rounds as fit between two looks of a reader; one at first, to learn how long a round takes."""
        return max(1, int(_STREAM_INTERVAL_S * self.rounds / self.decode_s)) if self.rounds else 1

    def _count(self, info: Any) -> None:
        self.rounds += int(info.rounds)
        self.active += np.asarray(info.active)
        for name in self.sums:
            self.sums[name] += float(getattr(info, name, 0.0))
        if isinstance(info, SpeculationInfo):
            accepted = np.asarray(info.accepted, np.int64)
            self.accepted = accepted + (self.accepted if self.accepted.size else 0)

    def _prefill(self) -> Any:
        prompts, method = self._batch.prompts, self._method
        lengths = np.array([len(p) for p in prompts], np.int32)
        chunks = bucket_lengths(int(lengths.max()))
        longest = max(max(self._batch.limit) + method.margin, sum(chunks) + method.lookahead)
        slots = max(SMALLEST_CACHE, 1 << (longest - 1).bit_length())
        tokens = np.zeros((len(prompts), slots), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        prefill, start, prompt_lengths = method.empty(len(prompts), slots), 0, jnp.asarray(lengths)
        for chunk in chunks:
            part = jnp.asarray(tokens[:, start : start + chunk + method.lookahead])
            arguments = (prefill, part, jnp.int32(start), prompt_lengths)
            prefill = self._timed("prefill_s", method.read, method.prefill_settings, *arguments, donate=(1,))
            start += chunk
        limit = jnp.asarray(np.array(self._batch.limit, np.int32))
        rest = (jnp.asarray(tokens), prompt_lengths, limit, self._stops, jax.random.key(self._batch.seed))
        return self._timed("prefill_s", method.begin, method.settings, *prefill, *rest, donate=method.donated)

    def _timed(
        self, clock: str, function: Callable[..., Any], settings: Any, *arguments: Any, donate: tuple[int, ...]
    ) -> Any:
        compiled, started = self._programs.compile_s, time.perf_counter()
        out = self._programs.run(function, settings, self._method.params, *arguments, donate=donate)
        jax.block_until_ready(out)
        spent = time.perf_counter() - started - (self._programs.compile_s - compiled)
        setattr(self, clock, getattr(self, clock) + spent)
        return out

    def _collect(self, state: Any, on_tokens: OnTokens | None) -> None:
        decoding = self._method.decoding(state)
        tokens, length = np.asarray(decoding.tokens), np.asarray(decoding.length)
        sequences = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
        if on_tokens:
            on_tokens([new[len(old) :] for new, old in zip(sequences, self.sequences, strict=True)])
        self.sequences = sequences
