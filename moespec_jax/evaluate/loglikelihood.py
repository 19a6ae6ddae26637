"""Log-likelihoods of texts: by a direct forward pass, or by verifying passes under the trees and the budget of a way.

Directly, a text is read as a prompt is. By verifying passes it is followed token by token as in `follow`: the part that
is given is read exactly, as prompts are, but for its last token, which is the first tree's root; so every token that is
scored, also a single one, has its probability from a verification, as in the middle of a generation. Where only one
token is given there is nothing before a root: that token is read, and the one after it scored exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.autoregressive import (
    SMALLEST_BUCKET,
    PrefillState,
    Settings,
    bucket_lengths,
    prefill_chunk,
    read_chunk,
)
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import SpeculationSettings, SpeculationState, Speculator
from moespec_jax.evaluate.ways import Way
from moespec_jax.measure.fidelity import with_texts
from moespec_jax.measure.teacher_forcing import follow_round
from moespec_jax.nn.decoder import Decoder, unembed
from moespec_jax.nn.layers import rms_norm
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import SMALLEST_CACHE, Batch, Run


class Text(NamedTuple):
    """`tokens`, of which the first `given` are not scored, and `candidates` for the token after the last."""

    tokens: list[int]
    given: int
    candidates: list[int]


class Scored(NamedTuple):
    """Of each scored token, and of each candidate: log-probability in nats, and whether it is the most probable."""

    tokens: list[tuple[float, bool]]
    candidates: list[tuple[float, bool]]


class Rows(NamedTuple):
    """Of texts side by side, on the device or the host: what position p, which sees the text up to token p, says of
    token p + 1 (`[texts, slots]`), and the distribution after the last token (`[texts, vocab]`)."""

    log_p: Array | np.ndarray
    best: Array | np.ndarray
    last: Array | np.ndarray


def score_batch(model: Model, way: Way, texts: Sequence[Text], size: int) -> list[Scored]:
    """Texts scored as one batch of `size`, filled up with copies: through verifying passes where the way has a budget,
    directly where it has none."""
    filled = [*texts, *[texts[-1]] * (size - len(texts))]
    rows = score_directly(model, filled) if way.budget is None else score_verified(model, way, filled)
    return [_scored(text, Rows(*row)) for text, row in zip(texts, zip(*rows, strict=True), strict=False)]


def _scored(text: Text, row: Rows) -> Scored:
    span = slice(text.given - 1, len(text.tokens) - 1)
    log_p, best, last = (np.asarray(values) for values in row)
    tokens = list(zip(log_p[span].tolist(), best[span].tolist(), strict=True))
    return Scored(tokens, [(float(last[i]), bool(last[i] == last.max())) for i in text.candidates])


def score_directly(model: Model, texts: Sequence[Text]) -> Rows:
    """Texts read as prompts are, in chunks of bucketed length; a chunk without a scored token is only read."""
    method, run = model.method(SamplingConfig()), model.programs.run
    longest = max(len(text.tokens) for text in texts)
    lengths = jnp.asarray([len(text.tokens) for text in texts], jnp.int32)
    slots = max(SMALLEST_CACHE, 1 << (sum(bucket_lengths(longest)) - 1).bit_length())
    tokens = _side_by_side(texts, slots + 1)
    log_p, best = np.zeros((len(texts), slots), np.float32), np.zeros((len(texts), slots), bool)
    state, start = method.empty(len(texts), slots), 0
    for chunk in bucket_lengths(longest):
        span = slice(start, start + chunk)
        part = jnp.asarray(tokens[:, start : start + chunk + 1])
        if any(max(text.given - 1, start) < min(len(text.tokens) - 1, span.stop) for text in texts):
            arguments = (state, part, jnp.int32(start), lengths)
            state, *found = run(score_chunk, method.settings, method.params, *arguments, donate=(1,))
            log_p[:, span], best[:, span] = (np.asarray(values) for values in found)
        else:
            arguments = (state, part[:, :-1], jnp.int32(start), lengths)
            state = run(prefill_chunk, method.settings, method.params, *arguments, donate=(1,))
        start += chunk
    last = run(score_last, method.settings, method.params, state.last_hidden)
    return Rows(log_p, best, np.asarray(last))


def score_chunk(
    settings: Settings,
    params: Decoder,
    state: PrefillState,
    tokens: Int[Array, "batch chunk_and_one"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
) -> tuple[PrefillState, Float[Array, "batch chunk"], Bool[Array, "batch chunk"]]:
    """As `autoregressive.prefill_chunk`, and what each position says of the token after it."""
    config, (batch, chunk) = settings.config, tokens[:, 1:].shape
    layers = (config.num_hidden_layers,)
    state, left = read_chunk(settings, params, state, tokens[:, :-1], start, lengths, layers)
    assert left is not None
    hidden = rms_norm(left, params.norm, config.rms_norm_eps)

    def score(block: tuple[Array, Array]) -> tuple[Array, Array]:
        return say(unembed(params, block[0]), block[1])

    # A few rows at a time: the logits of a whole chunk may be larger than the model.
    blocks = (batch, chunk // SMALLEST_BUCKET, SMALLEST_BUCKET)
    split = (hidden.reshape(*blocks, -1).swapaxes(0, 1), tokens[:, 1:].reshape(blocks).swapaxes(0, 1))
    log_p, best = (found.swapaxes(0, 1).reshape(batch, chunk) for found in jax.lax.map(score, split))
    return state, log_p, best


def score_last(
    settings: Settings, params: Decoder, last_hidden: Float[Array, "batch model"]
) -> Float[Array, "batch vocab"]:
    """Log-probabilities after each text's last token."""
    return jax.nn.log_softmax(unembed(params, last_hidden), axis=-1)


def score_verified(model: Model, way: Way, texts: Sequence[Text]) -> Rows:
    """Texts followed through verifying passes, each a batch of its own to the budget."""
    method, given = way.method(model, SamplingConfig()), [max(text.given - 1, 1) for text in texts]
    # One token more, whichever: a text is done when it has it, and then its own last token has been verified.
    longer = [[*text.tokens, 0] for text in texts]
    batch = Batch([text[:count] for text, count in zip(longer, given, strict=True)], [len(t) for t in longer], (), 0)
    state = with_texts(Run(model.programs, method, batch).state_after(0), longer, given)
    _, found = model.programs.run(follow_scored, method.settings, method.params, state, donate=(1,))
    log_p, best, last = (np.array(values) for values in found)
    if any(text.given == 1 for text in texts):
        # What follows a single given token, exactly.
        first = np.asarray(score_directly(model, [Text(text.tokens[:1], 1, []) for text in texts]).last)
        for i, text in enumerate(texts):
            if len(text.tokens) == 1:
                last[i] = first[i]
            elif text.given == 1:
                log_p[i, 0], best[i, 0] = first[i, text.tokens[1]], first[i].argmax() == text.tokens[1]
    return Rows(log_p, best, last)


def follow_scored(
    settings: SpeculationSettings, params: Speculator, state: SpeculationState
) -> tuple[SpeculationState, Rows]:
    """Every text of `state` to its end; the last token before its limit is not the text's."""
    slots = state.decoding.tokens.shape
    nothing = jnp.zeros((slots[0], settings.target.config.vocab_size), jnp.float32)

    def step(carry: tuple[SpeculationState, Rows]) -> tuple[SpeculationState, Rows]:
        before, rows = carry
        accepted, logits, _, after = follow_round(settings, params, before)
        decoding = before.decoding
        place = Place(decoding.tokens, decoding.length, decoding.limit, decoding.done)
        return after, jax.vmap(record)(rows, place, accepted, logits)

    rows = Rows(jnp.zeros(slots, jnp.float32), jnp.zeros(slots, bool), nothing)
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].decoding.done), step, (state, rows))


class Place(NamedTuple):
    """How far texts are: fields of a `DecodeState`."""

    tokens: Int[Array, "*texts slots"]
    length: Int[Array, "*texts"]
    limit: Int[Array, "*texts"]
    done: Bool[Array, "*texts"]


def record(rows: Rows, decoding: Place, accepted: Accepted, logits: Float[Array, "nodes vocab"]) -> Rows:
    """One text's committed rows, put at their positions; the last one's distribution is kept whole."""
    step = jnp.arange(accepted.path.shape[0], dtype=jnp.int32)
    position = decoding.length - 1 + step
    counts = (step < accepted.count) & ~decoding.done
    where = jnp.where(counts, position, decoding.tokens.shape[0])
    along = logits[accepted.path]
    log_p, best = say(along, decoding.tokens[position + 1])
    end = decoding.limit - 2 - position[0]
    last = jax.nn.log_softmax(along[jnp.minimum(end, accepted.count - 1)])
    return Rows(
        jnp.asarray(rows.log_p).at[where].set(log_p, mode="drop"),
        jnp.asarray(rows.best).at[where].set(best, mode="drop"),
        jnp.where((end < accepted.count) & ~decoding.done, last, rows.last),
    )


def say(
    logits: Float[Array, "*rows vocab"], following: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Bool[Array, "*rows"]]:
    """Log-probability of the token that follows each row, and whether it is the most probable."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), following[..., None], axis=-1)[..., 0]
    return log_p, jnp.argmax(logits, axis=-1).astype(jnp.int32) == following


def _side_by_side(texts: Sequence[Text], slots: int) -> np.ndarray:
    tokens = np.zeros((len(texts), slots), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text.tokens)] = text.tokens
    return tokens
