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

from moespec_jax.accept import Accepted
from moespec_jax.attention import LayerAttention, attend_layer, causal_mask
from moespec_jax.cache import Cache, empty_cache
from moespec_jax.config import DecoderConfig
from moespec_jax.decoder import Decoder, ForwardInfo, forward, unembed
from moespec_jax.mesh import largest, over_data
from moespec_jax.moe import ExpertCompute
from moespec_jax.sample import SamplingConfig, draw
from moespec_jax.tree import Tree

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


def experts_wanted(config: DecoderConfig, info: ForwardInfo, batch: int) -> Bool[Array, "layers batch experts"]:
    """Whether any row of a sequence chose an expert, in every sparse layer."""
    return _any_row(config, [router.experts for router in info.routers], batch)


def experts_read(config: DecoderConfig, info: ForwardInfo, batch: int) -> Bool[Array, "layers batch experts"]:
    """Whether any row of a sequence went to an expert, in every sparse layer: what it chose, or what a budget left."""
    routed = [r.experts if r.restricted is None else r.restricted.routing.experts for r in info.routers]
    return _any_row(config, routed, batch)


def _any_row(config: DecoderConfig, ids: list[Array], batch: int) -> Bool[Array, "layers batch experts"]:
    if not ids:
        return jnp.zeros((0, batch, config.num_experts), bool)
    chosen = jnp.stack([layer.reshape(batch, -1) for layer in ids])
    every = jnp.arange(config.num_experts, dtype=jnp.int32)
    return jnp.any(chosen[..., None] == every[None, None, None, :], axis=2)


def mean_distinct_experts(hit: Bool[Array, "layers batch experts"]) -> Float[Array, ""]:
    """Distinct experts routed to in a pass over the whole batch, averaged over sparse layers; 0 without any."""
    return jnp.sum(largest(jnp.any(hit, axis=1), over_data()), dtype=jnp.float32) / max(hit.shape[0], 1)


def mean_experts_of_busiest(hit: Bool[Array, "layers batch experts"], shards: int) -> Float[Array, ""]:
    """The most distinct experts that one device reads in a pass, of `shards` that share a layer's experts and all that
    share the batch, averaged over sparse layers."""
    each = jnp.any(hit, axis=1).reshape(hit.shape[0], shards, -1)
    most = jnp.max(jnp.sum(each, axis=2, dtype=jnp.int32), axis=1)
    return jnp.sum(largest(most, over_data()), dtype=jnp.float32) / max(hit.shape[0], 1)


def append_path(decoding: DecodeState, trees: Tree, accepted: Accepted) -> DecodeState:
    """Append accepted tokens and bonus to every unfinished sequence, cut where plain decoding would have stopped: after
    the first stop id, or at the limit."""
    width = accepted.path.shape[1]
    step = jnp.arange(width, dtype=jnp.int32)[None, :]
    path_tokens = jnp.take_along_axis(trees.tokens, accepted.path, axis=1)
    new = jnp.where(step < accepted.count[:, None] - 1, jnp.roll(path_tokens, -1, axis=1), accepted.bonus[:, None])
    stops = jnp.any(new[:, :, None] == decoding.stop_ids[None, None, :], axis=-1)
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, width)
    room = jnp.maximum(decoding.limit - decoding.length, 0)
    count = jnp.minimum(jnp.minimum(accepted.count, until_stop), room)
    count = jnp.where(decoding.done, 0, count)
    stopped = jnp.any(stops & (step < count[:, None]), axis=1)
    length = decoding.length + count
    # Which of the new tokens each slot of the buffer takes, if any.
    slot = jnp.arange(decoding.tokens.shape[1], dtype=jnp.int32)[None, :] - decoding.length[:, None]
    here = (slot >= 0) & (slot < count[:, None])
    taken = jnp.take_along_axis(new, jnp.clip(slot, 0, width - 1), axis=1)
    return dataclasses.replace(
        decoding,
        tokens=jnp.where(here, taken, decoding.tokens),
        length=length,
        done=decoding.done | stopped | (length >= decoding.limit),
    )


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
