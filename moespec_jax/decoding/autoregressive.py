"""Plain decoding as compiled programs: prefill in chunks of bucketed length, then one `lax.while_loop` over tokens.

The state is what the next step needs and is donated from call to call. Streaming runs the same program a few tokens at
a time: the number of steps is a traced bound, so nothing is compiled twice.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.round_info import experts_wanted, mean_distinct_experts, mean_experts_of_busiest
from moespec_jax.decoding.sampling import SamplingConfig, draw
from moespec_jax.nn.attention import LayerAttention, attend_layer, causal_mask
from moespec_jax.nn.cache import Cache, empty_cache
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.parallel.collectives import largest, over_data

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16


class Settings(NamedTuple):
    """What a decoding program is compiled for."""

    config: DecoderConfig
    sampling: SamplingConfig
    compute: ExpertCompute
    attention: LayerAttention = attend_layer


@struct.dataclass
class DecodeState:
    """A batch of sequences under way.

    `tokens` holds prompts and everything generated, `length` how many of them count. The cache lags by one: it holds
    all tokens but the newest. A sequence stops at a stop id or when its length reaches `limit`.
    """

    tokens: Int[Array, "batch slots"]
    length: Int[Array, " batch"]
    limit: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    stop_ids: Int[Array, " stops"]
    key: Array
    cache: Cache


# In place of a token, where logits are not finite.
NO_TOKEN = -1


class PrefillState(NamedTuple):
    """What one prefill chunk hands to the next: the cache, and the hidden state of each prompt's last token."""

    cache: Cache
    last_hidden: Float[Array, "batch model"]


def bucket_lengths(longest: int) -> list[int]:
    """Chunk lengths that cover a prompt of `longest` tokens: full chunks, then the next power of two."""
    full, rest = divmod(longest, PREFILL_CHUNK)
    tail = SMALLEST_BUCKET
    while tail < rest:
        tail *= 2
    return [PREFILL_CHUNK] * full + ([tail] if rest else [])


def empty_prefill(config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike, *, stacked: bool) -> PrefillState:
    """Nothing read yet."""
    cache = empty_cache(config, batch, slots, dtype, stacked=stacked)
    return PrefillState(cache, jnp.zeros((batch, config.hidden_size), dtype))


def prefill_chunk(
    settings: Settings,
    params: Decoder,
    state: PrefillState,
    tokens: Int[Array, "batch chunk"],
    start: Int[Array, ""],
    prompt_lengths: Int[Array, " batch"],
) -> PrefillState:
    """Read one chunk of every prompt, from position `start` on; tokens past a prompt's end are padding.

    Padding writes cache rows too, in slots that the sequence's own tokens overwrite before anything sees them.
    """
    return read_chunk(settings, params, state, tokens, start, prompt_lengths)[0]


def read_chunk(
    settings: Settings,
    params: Decoder,
    state: PrefillState,
    tokens: Int[Array, "batch chunk"],
    start: Int[Array, ""],
    prompt_lengths: Int[Array, " batch"],
    boundaries: tuple[int, ...] = (),
) -> tuple[PrefillState, Float[Array, "batch chunk aux"] | None]:
    """As `prefill_chunk`, with the states tapped at `boundaries`."""
    batch, chunk = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32)[None, :], (batch, chunk))
    cache = dataclasses.replace(state.cache, length=jnp.broadcast_to(start, (batch,)))
    hidden, cache, info = forward(
        settings.config,
        params,
        tokens,
        positions,
        causal_mask(positions, cache.slots),
        cache,
        settings.compute,
        valid=positions < prompt_lengths[:, None],
        longest=jnp.broadcast_to(prompt_lengths[:, None], positions.shape),
        boundaries=boundaries,
        attention=settings.attention,
    )
    assert cache is not None
    last = row_at(hidden, prompt_lengths - 1 - start, state.last_hidden)
    return PrefillState(cache, last), info.taps


def row_at(
    rows: Float[Array, "batch chunk width"], index: Int[Array, " batch"], otherwise: Float[Array, "batch width"]
) -> Float[Array, "batch width"]:
    """Each sequence's row `index[b]` where the chunk has it, `otherwise` where it has not."""
    chunk = rows.shape[1]
    picked = jnp.take_along_axis(rows, jnp.clip(index, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(((index >= 0) & (index < chunk))[:, None], picked, otherwise)


def begin(
    settings: Settings,
    params: Decoder,
    cache: Cache,
    last_hidden: Float[Array, "batch model"],
    tokens: Int[Array, "batch slots"],
    prompt_lengths: Int[Array, " batch"],
    limit: Int[Array, " batch"],
    stop_ids: Int[Array, " stops"],
    key: Array,
) -> DecodeState:
    """Draw every sequence's first token from what prefill saw last."""
    state = DecodeState(
        tokens=tokens,
        length=prompt_lengths,
        limit=limit,
        done=prompt_lengths >= limit,
        stop_ids=stop_ids,
        key=key,
        cache=dataclasses.replace(cache, length=prompt_lengths),
    )
    return _append(settings, state, unembed(params, last_hidden))


class DecodeInfo(NamedTuple):
    """Of one call: forward passes run, in how many of them each sequence took part, and the sums over them of the mean
    number of distinct experts that a layer wanted, and that the busiest device read."""

    rounds: Int[Array, ""]
    active: Int[Array, " batch"]
    experts_wanted: Float[Array, ""]
    experts_slowest: Float[Array, ""]


def decode_steps(
    settings: Settings, params: Decoder, state: DecodeState, steps: Int[Array, ""]
) -> tuple[DecodeState, DecodeInfo]:
    """Up to `steps` tokens for every unfinished sequence."""

    def unfinished(carry: tuple[DecodeState, DecodeInfo]) -> Array:
        return (carry[1].rounds < steps) & any_left(carry[0])

    def step(carry: tuple[DecodeState, DecodeInfo]) -> tuple[DecodeState, DecodeInfo]:
        before, info = carry
        state, wanted = _decode_one(settings, params, before)
        active = info.active + (~before.done).astype(jnp.int32)
        mean, most = mean_distinct_experts(wanted), mean_experts_of_busiest(wanted, params.split.experts)
        return state, DecodeInfo(info.rounds + 1, active, info.experts_wanted + mean, info.experts_slowest + most)

    nothing = DecodeInfo(jnp.int32(0), jnp.zeros_like(state.length), jnp.float32(0.0), jnp.float32(0.0))
    return jax.lax.while_loop(unfinished, step, (state, nothing))


def any_left(state: DecodeState) -> Bool[Array, ""]:
    """Whether any sequence of the whole batch is unfinished: devices that share it must loop equally often."""
    return largest(~jnp.all(state.done), over_data())


def _decode_one(settings: Settings, params: Decoder, state: DecodeState) -> tuple[DecodeState, Bool[Array, "..."]]:
    """One forward pass over the newest token of every sequence, and what `experts_wanted` says of it."""
    positions = (state.length - 1)[:, None]
    newest = jnp.take_along_axis(state.tokens, positions, axis=1)
    hidden, cache, info = forward(
        settings.config,
        params,
        newest,
        positions,
        causal_mask(positions, state.cache.slots),
        dataclasses.replace(state.cache, length=state.length - 1),
        settings.compute,
        valid=~state.done[:, None],
        longest=state.length[:, None],
        attention=settings.attention,
    )
    assert cache is not None
    wanted = experts_wanted(settings.config, info, len(newest))
    return _append(settings, dataclasses.replace(state, cache=cache), unembed(params, hidden[:, 0])), wanted


def _append(settings: Settings, state: DecodeState, logits: Float[Array, "batch vocab"]) -> DecodeState:
    """Draw a token for every unfinished sequence and put it after its last one."""
    drawn = draw(settings.sampling, state.key, logits, state.length)
    # What stop ids are filled up with too: the sequence ends, and `Run` tells why.
    drawn = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), drawn, NO_TOKEN)
    slot = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None, :]
    here = (slot == state.length[:, None]) & ~state.done[:, None]
    length = jnp.where(state.done, state.length, state.length + 1)
    stopped = jnp.any(drawn[:, None] == state.stop_ids[None, :], axis=1)
    return dataclasses.replace(
        state,
        tokens=jnp.where(here, drawn[:, None], state.tokens),
        length=length,
        done=state.done | stopped | (length >= state.limit),
    )
