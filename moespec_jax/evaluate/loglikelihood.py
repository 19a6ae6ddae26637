"""Log-likelihoods of texts: by a direct forward pass, or by verifications under the tree and the budget of a spec.

Directly, a text is prefilled. By verifications it is teacher-forced (`measure/teacher_forcing.py`): the given part is
prefilled exactly, except for its last token, which is the root of the first tree. So the probability of every scored
token comes from a verification, as in the middle of a generation. If only one token is given, it is prefilled, since a
root must follow other tokens, and the next token is scored exactly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.autoregressive import TargetPrefill
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.states import PrefillState, any_unfinished
from moespec_jax.evaluate.specs import EvaluatedSpec, speculative_method
from moespec_jax.measure.fidelity import with_texts
from moespec_jax.measure.teacher_forcing import forced_round
from moespec_jax.measure.text_chunks import TextChunks, in_blocks, read_chunk
from moespec_jax.nn.decoder import Decoder, unembed
from moespec_jax.parallel.processes import fetch
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run


class Text(NamedTuple):
    """A text to score.

    Fields:
        tokens: token ids.
        given: number of first tokens that are not scored.
        candidates: token ids to score after the last token.
    """

    tokens: list[int]
    given: int
    candidates: list[int]


class Scored(NamedTuple):
    """Scores of a text: log-probability in nats, and whether the token is the most probable one.

    Fields:
        tokens: of each token after the given ones.
        candidates: of each candidate.
    """

    tokens: list[tuple[float, bool]]
    candidates: list[tuple[float, bool]]


class Rows(NamedTuple):
    """Scores of a batch of texts, on the device or the host. Position p is the prediction after token p.

    Fields:
        log_p: log-probability of token p + 1, `[texts, slots]`.
        best: whether it is the most probable token, `[texts, slots]`.
        last: log-probabilities after the last token, `[texts, vocab]`.
    """

    log_p: Array | np.ndarray
    best: Array | np.ndarray
    last: Array | np.ndarray


def score_batch(model: Model, evaluated: EvaluatedSpec, texts: Sequence[Text], size: int) -> list[Scored]:
    """Score texts as one batch of `size`, filled with copies: by verifications under a budget, directly without one."""
    filled = [*texts, *[texts[-1]] * (size - len(texts))]
    exact = evaluated.spec.budget is None
    rows = score_directly(model, filled) if exact else score_verified(model, evaluated, filled)
    return [_scored(text, Rows(*row)) for text, row in zip(texts, zip(*rows, strict=True), strict=False)]


def _scored(text: Text, row: Rows) -> Scored:
    span = slice(text.given - 1, len(text.tokens) - 1)
    log_p, best, last = (np.asarray(values) for values in row)
    tokens = list(zip(log_p[span].tolist(), best[span].tolist(), strict=True))
    return Scored(tokens, [(float(last[i]), bool(last[i] == last.max())) for i in text.candidates])


def score_directly(model: Model, texts: Sequence[Text]) -> Rows:
    """Score texts by prefill in chunks of bucketed length; logits are computed for chunks with scored tokens only."""
    prefill, params, run = model.autoregressive(SamplingConfig()).prefill, model.params, model.programs.run
    chunks, count = TextChunks(model.programs, [text.tokens for text in texts]), len(texts)
    by_text = cast(Any, BY_SEQUENCE)
    log_p, best = np.zeros((count, chunks.slots), np.float32), np.zeros((count, chunks.slots), bool)
    state, lengths, specs = chunks.empty(prefill, params), chunks.lengths, prefill.specs(params)
    for span, tokens, start in chunks:
        if any(max(text.given - 1, span.start) < min(len(text.tokens) - 1, span.stop) for text in texts):
            scored = (specs, by_text, by_text)
            state, *found = run(score_chunk, prefill, params, state, tokens, start, lengths, donate=True, specs=scored)
            log_p[:, span], best[:, span] = (fetch(values)[:count] for values in found)
        else:
            read = TargetPrefill.read
            state = run(read, prefill, params, state, tokens[:, :-1], start, lengths, donate=True, specs=specs)
    last = run(score_last, prefill, params, state.last_hidden, specs=by_text)
    return Rows(log_p, best, fetch(last)[:count])


def score_chunk(
    prefill: TargetPrefill,
    params: Decoder,
    state: PrefillState,
    tokens: Int[Array, "batch chunk_and_one"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
) -> tuple[PrefillState, Float[Array, "batch chunk"], Bool[Array, "batch chunk"]]:
    """Read a chunk and score the token after each position: log-probability, and whether it is the most probable."""
    state, hidden = read_chunk(prefill, params, state, tokens[:, :-1], start, lengths)

    def score(hidden: Array, following: Array) -> tuple[Array, Array]:
        return score_rows(unembed(params, hidden), following)

    log_p, best = in_blocks(score, hidden, tokens[:, 1:])
    return state, log_p, best


def score_last(
    prefill: TargetPrefill, params: Decoder, last_hidden: Float[Array, "batch model"]
) -> Float[Array, "batch vocab"]:
    """Compute log-probabilities after each text's last token."""
    return jax.nn.log_softmax(unembed(params, last_hidden), axis=-1)


def score_verified(model: Model, evaluated: EvaluatedSpec, texts: Sequence[Text]) -> Rows:
    """Score texts by teacher-forced verifications; the budget chooses experts for each text separately."""
    method, given = speculative_method(model, evaluated, SamplingConfig()), [max(text.given - 1, 1) for text in texts]
    # One more token of any value: a text is done when it is committed, so that the last token of the text is verified.
    longer = [[*text.tokens, 0] for text in texts]
    batch = Batch([text[:count] for text, count in zip(longer, given, strict=True)], [len(t) for t in longer], (), 0)
    params = model.speculative_params
    state = with_texts(model.programs, Run(model.programs, method, params, batch).state_after(0), longer, given)
    by_text = cast(Any, BY_SEQUENCE)
    specs = (method.specs(params)[0], Rows(by_text, by_text, by_text))
    _, found = model.programs.run(score_forced, method, params, state, donate=True, specs=specs)
    log_p, best, last = (np.array(fetch(cast(Array, values))[: len(texts)]) for values in found)
    if any(text.given == 1 for text in texts):
        # The token after a single given token is scored exactly.
        first = np.asarray(score_directly(model, [Text(text.tokens[:1], 1, []) for text in texts]).last)
        for i, text in enumerate(texts):
            if len(text.tokens) == 1:
                last[i] = first[i]
            elif text.given == 1:
                log_p[i, 0], best[i, 0] = first[i, text.tokens[1]], first[i].argmax() == text.tokens[1]
    return Rows(log_p, best, last)


def score_forced(
    method: Speculative[Any, Any], params: SpeculativeParams[Any], state: SpeculationState[Any]
) -> tuple[SpeculationState[Any], Rows]:
    """Score every text of `state` to its end; the last token before its limit is not part of the text."""
    slots = state.decoding.tokens.shape
    last = jnp.zeros((slots[0], method.target.config.vocab_size), jnp.float32)

    def step(carry: tuple[SpeculationState[Any], Rows]) -> tuple[SpeculationState[Any], Rows]:
        before, rows = carry
        accepted, logits, _, after = forced_round(method, params, before)
        decoding = before.decoding
        progress = Progress(decoding.tokens, decoding.length, decoding.limit, decoding.done)
        return after, jax.vmap(add_rows)(rows, progress, accepted, logits)

    rows = Rows(jnp.zeros(slots, jnp.float32), jnp.zeros(slots, bool), last)
    return jax.lax.while_loop(lambda carry: any_unfinished(carry[0].decoding), step, (state, rows))


class Progress(NamedTuple):
    """Progress of texts: the fields of `DecodeState` that scoring needs."""

    tokens: Int[Array, "*texts slots"]
    length: Int[Array, "*texts"]
    limit: Int[Array, "*texts"]
    done: Bool[Array, "*texts"]


def add_rows(rows: Rows, progress: Progress, accepted: Accepted, logits: Float[Array, "nodes vocab"]) -> Rows:
    """Write the scores of one text's committed rows, and the distribution after its last token."""
    step = jnp.arange(accepted.path.shape[0], dtype=jnp.int32)
    position = progress.length - 1 + step
    committed = (step < accepted.count) & ~progress.done
    where = jnp.where(committed, position, progress.tokens.shape[0])
    path_logits = logits[accepted.path]
    log_p, best = score_rows(path_logits, progress.tokens[position + 1])
    end = progress.limit - 2 - position[0]
    last = jax.nn.log_softmax(path_logits[jnp.minimum(end, accepted.count - 1)])
    return Rows(
        jnp.asarray(rows.log_p).at[where].set(log_p, mode="drop"),
        jnp.asarray(rows.best).at[where].set(best, mode="drop"),
        jnp.where((end < accepted.count) & ~progress.done, last, rows.last),
    )


def score_rows(
    logits: Float[Array, "*rows vocab"], next_tokens: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Bool[Array, "*rows"]]:
    """Compute the log-probability of each row's next token, and whether it is the most probable."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), next_tokens[..., None], axis=-1)[..., 0]
    return log_p, jnp.argmax(logits, axis=-1).astype(jnp.int32) == next_tokens
