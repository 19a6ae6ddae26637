"""Plain decoding: prompts are read in chunks of bucketed length, then every round is one forward pass for one token."""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.logprobs import no_logprobs
from moespec_jax.decoding.method import run_rounds
from moespec_jax.decoding.round_info import RoundInfo, RunInfo, no_plain_rounds, plain_round_info
from moespec_jax.decoding.sampling import SamplingConfig, draw
from moespec_jax.decoding.state_specs import decode_state_specs, plain_run_info_specs, prefill_state_specs
from moespec_jax.decoding.states import NO_TOKEN, DecodeState, PrefillState, Prompts, any_unfinished, append_tokens
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.best_tokens import BestTokens, highest_logit, logits_or_best
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, forward

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16


def bucket_lengths(longest: int) -> list[int]:
    """List chunk lengths that cover a prompt of `longest` tokens: full chunks, then the next power of two."""
    full, rest = divmod(longest, PREFILL_CHUNK)
    tail = SMALLEST_BUCKET
    while tail < rest:
        tail *= 2
    return [PREFILL_CHUNK] * full + ([tail] if rest else [])


@dataclasses.dataclass(frozen=True)
class TargetPrefill:
    """Prompts read by the target alone (`method.Prefill`)."""

    config: DecoderConfig
    backend: Backend
    lookahead: int = 0

    def init(self, params: Decoder, batch: int, slots: int) -> PrefillState:
        """Allocate an empty cache."""
        dtype = params.embed.dtype
        cache = empty_cache(self.config, batch, slots, dtype, stacked=params.stacked)
        return PrefillState(cache, jnp.zeros((batch, self.config.hidden_size), dtype))

    def read(
        self,
        params: Decoder,
        state: PrefillState,
        tokens: Int[Array, "batch chunk"],
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
    ) -> PrefillState:
        """Read one chunk of every prompt."""
        return self.read_with_aux(params, state, tokens, start, prompt_lengths, ())[0]

    def read_with_aux(
        self,
        params: Decoder,
        state: PrefillState,
        tokens: Int[Array, "batch chunk"],
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
        boundaries: tuple[int, ...],
    ) -> tuple[PrefillState, Float[Array, "batch chunk aux"] | None]:
        """Read one chunk of every prompt; also the hidden states at `boundaries`.

        Padding writes cache rows too, in slots that the sequence's own tokens overwrite before anything reads them.
        """
        batch, chunk = tokens.shape
        positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32)[None, :], (batch, chunk))
        cache = dataclasses.replace(state.cache, length=jnp.broadcast_to(start, (batch,)))
        hidden, cache, info = forward(
            self.config,
            params,
            tokens,
            positions,
            causal_mask(positions, cache.slots),
            cache,
            self.backend,
            valid=positions < prompt_lengths[:, None],
            rope_length=jnp.broadcast_to(prompt_lengths[:, None], positions.shape),
            boundaries=boundaries,
        )
        assert cache is not None
        last = row_at(hidden, prompt_lengths - 1 - start, state.last_hidden)
        return PrefillState(cache, last), info.aux_hidden_states

    def specs(self, params: Decoder) -> PrefillState:
        """Sharding of the state on a mesh."""
        return prefill_state_specs(params)


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Plain decoding (`method.Method`).

    Fields:
        config: the target's settings.
        sampling: how tokens are drawn.
        backend: expert compute and attention.
        logprobs: number of most probable tokens that are recorded with the log-probability of every token; None records
            nothing.
    """

    config: DecoderConfig
    sampling: SamplingConfig
    backend: Backend
    margin: int = 0
    logprobs: int | None = None

    @property
    def prefill(self) -> TargetPrefill:
        """Prompts are read by the target; nothing is drawn, so that one program serves every way of sampling."""
        return TargetPrefill(self.config, self.backend)

    def begin(self, params: Decoder, state: PrefillState, prompts: Prompts) -> DecodeState:
        """Draw every sequence's first token."""
        decoding = DecodeState(
            tokens=prompts.tokens,
            length=prompts.lengths,
            # An array of its own: a state is donated, and no array may be in it twice.
            prompt_length=prompts.lengths + 0,
            limit=prompts.limit,
            done=prompts.lengths >= prompts.limit,
            stop_ids=prompts.stop_ids,
            key=prompts.key,
            cache=dataclasses.replace(state.cache, length=prompts.lengths),
            logprobs=None if self.logprobs is None else no_logprobs(prompts.tokens, self.logprobs),
        )
        return self._append(decoding, self._outputs(params, state.last_hidden))

    def step(self, params: Decoder, state: DecodeState, rounds: Int[Array, ""]) -> tuple[DecodeState, RunInfo]:
        """Generate up to `rounds` tokens for every unfinished sequence."""
        start, shards = no_plain_rounds(len(state.length)), params.sharding.experts
        return run_rounds(partial(self.round, params), self._proceeds, state, rounds, start, shards)

    def round(self, params: Decoder, state: DecodeState) -> tuple[DecodeState, RoundInfo]:
        """Run one forward pass over the newest token of every sequence, and draw the next."""
        positions = (state.length - 1)[:, None]
        hidden, cache, info = forward(
            self.config,
            params,
            state.newest,
            positions,
            causal_mask(positions, state.cache.slots),
            dataclasses.replace(state.cache, length=state.length - 1),
            self.backend,
            valid=~state.done[:, None],
            rope_length=state.length[:, None],
        )
        assert cache is not None
        round_info = plain_round_info(self.config, ~state.done, info)
        return self._append(dataclasses.replace(state, cache=cache), self._outputs(params, hidden[:, 0])), round_info

    def _proceeds(self, state: DecodeState, rounds: Int[Array, ""]) -> Array:
        return any_unfinished(state)

    def kept(self, state: DecodeState) -> Int[Array, " batch"]:
        """All tokens but the newest."""
        return state.length - 1

    def resume(self, params: Decoder, state: DecodeState) -> PrefillState:
        """Keep the cache."""
        shape = (len(state.length), self.config.hidden_size)
        return PrefillState(state.cache, jnp.zeros(shape, params.embed.dtype))

    def sequences(self, state: DecodeState) -> DecodeState:
        """The state itself."""
        return state

    def specs(self, params: Decoder) -> tuple[DecodeState, RunInfo]:
        """Sharding of the results of `step` on a mesh."""
        return decode_state_specs(params, logprobs=self.logprobs is not None), plain_run_info_specs()

    def _outputs(
        self, params: Decoder, hidden: Float[Array, "batch model"]
    ) -> Float[Array, "batch vocab"] | BestTokens:
        """Compute what the next tokens are drawn from."""
        best_suffices = self.sampling.best_suffices and self.logprobs is None
        return logits_or_best(params, hidden, best_suffices=best_suffices)

    def _append(self, state: DecodeState, outputs: Float[Array, "batch vocab"] | BestTokens) -> DecodeState:
        """Draw a token for every unfinished sequence and append it."""
        drawn = draw(self.sampling, state.key, outputs, state.histories)
        # `NO_TOKEN` ends a sequence, as it pads the stop ids; `Run` then reports the logits.
        drawn = jnp.where(jnp.isfinite(highest_logit(outputs)), drawn, NO_TOKEN)
        logits = None if isinstance(outputs, BestTokens) else outputs[:, None]
        return append_tokens(state, drawn[:, None], jnp.ones_like(state.length), logits)


def row_at(
    rows: Float[Array, "batch chunk width"], index: Int[Array, " batch"], otherwise: Float[Array, "batch width"]
) -> Float[Array, "batch width"]:
    """Take row `index[b]` of each sequence where it is inside the chunk, else `otherwise[b]`."""
    chunk = rows.shape[1]
    picked = jnp.take_along_axis(rows, jnp.clip(index, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(((index >= 0) & (index < chunk))[:, None], picked, otherwise)
