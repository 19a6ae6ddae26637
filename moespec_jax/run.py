"""One batch on its way through the compiled programs: prefill, then decoding, in pieces if it is streamed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.decode import (
    DecodeState,
    Settings,
    begin,
    bucket_lengths,
    decode_steps,
    empty_prefill,
    prefill_chunk,
)
from moespec_jax.decoder import Decoder
from moespec_jax.programs import Programs
from moespec_jax.sample import SamplingConfig

SMALLEST_CACHE = 256
_STREAM_INTERVAL_S = 0.1
_STOP_SLOTS = 8
# Takes each sequence's new token ids, as often as they arrive.
OnTokens = Callable[[list[list[int]]], None]


class Batch(NamedTuple):
    """What is asked of one run: prompts as token ids, the length each sequence may reach, stop ids and seed."""

    prompts: list[list[int]]
    limit: list[int]
    stop_ids: tuple[int, ...]
    seed: int


class Run:
    """One batch on its way through the compiled programs of one model.

    `sequences` are the prompts with what was generated so far; `prefill_s`, `decode_s` exclude compilation, which is
    `compile_s`; `rounds` counts forward passes after prefill and `experts_wanted` sums over them.
    """

    def __init__(self, programs: Programs, settings: Settings, params: Decoder, dtype: DTypeLike, batch: Batch):
        self._programs, self._settings, self._params, self._dtype = programs, settings, params, dtype
        self._batch = batch
        # No id is -1. Padded, so that neither `ignore_eos` nor a few more stop ids compile anything anew.
        self._stops = jnp.asarray([*batch.stop_ids, *[-1] * (_STOP_SLOTS - len(batch.stop_ids))], jnp.int32)
        self._compiled_before = programs.compile_s
        self.prefill_s = self.decode_s = 0.0
        self.rounds, self.experts_wanted = 0, 0.0
        self.sequences = batch.prompts

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling for this run."""
        return self._programs.compile_s - self._compiled_before

    def execute(self, on_tokens: OnTokens | None) -> None:
        """Prefill, then decode until every sequence is done."""
        state = self._prefill()
        self._collect(state, on_tokens)
        while not bool(jnp.all(state.done)):
            steps = jnp.int32(self._steps_per_call() if on_tokens else max(self._batch.limit))
            state, info = self._timed("decode_s", decode_steps, self._settings, state, steps, donate=(1,))
            self.rounds += int(info.rounds)
            self.experts_wanted += float(info.experts_wanted)
            self._collect(state, on_tokens)

    def _steps_per_call(self) -> int:
        """As many steps as fit between two looks of a reader; one at first, to learn how long a step takes."""
        return max(1, int(_STREAM_INTERVAL_S * self.rounds / self.decode_s)) if self.rounds else 1

    def _prefill(self) -> DecodeState:
        prompts, config = self._batch.prompts, self._settings.config
        lengths = np.array([len(p) for p in prompts], np.int32)
        chunks = bucket_lengths(int(lengths.max()))
        slots = max(SMALLEST_CACHE, 1 << (max(self._batch.limit) - 1).bit_length(), sum(chunks))
        tokens = np.zeros((len(prompts), slots), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        prefill = empty_prefill(config, len(prompts), slots, self._dtype, stacked=self._params.stacked)
        start, prompt_lengths = 0, jnp.asarray(lengths)
        # Prefill draws nothing: one program serves every way of sampling.
        settings = self._settings._replace(sampling=SamplingConfig())
        for chunk in chunks:
            part = jnp.asarray(tokens[:, start : start + chunk])
            arguments = (prefill, part, jnp.int32(start), prompt_lengths)
            prefill = self._timed("prefill_s", prefill_chunk, settings, *arguments, donate=(1,))
            start += chunk
        limit = jnp.asarray(np.array(self._batch.limit, np.int32))
        rest = (jnp.asarray(tokens), prompt_lengths, limit, self._stops, jax.random.key(self._batch.seed))
        last = (prefill.cache, prefill.last_hidden)
        return self._timed("prefill_s", begin, self._settings, *last, *rest, donate=(1, 3))

    def _timed(
        self, clock: str, function: Callable[..., Any], settings: Settings, *arguments: Any, donate: tuple[int, ...]
    ) -> Any:
        compiled, started = self._programs.compile_s, time.perf_counter()
        out = self._programs.run(function, settings, self._params, *arguments, donate=donate)
        jax.block_until_ready(out)
        spent = time.perf_counter() - started - (self._programs.compile_s - compiled)
        setattr(self, clock, getattr(self, clock) + spent)
        return out

    def _collect(self, state: DecodeState, on_tokens: OnTokens | None) -> None:
        tokens, length = np.asarray(state.tokens), np.asarray(state.length)
        sequences = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
        if on_tokens:
            on_tokens([new[len(old) :] for new, old in zip(sequences, self.sequences, strict=True)])
        self.sequences = sequences
