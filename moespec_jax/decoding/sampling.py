"""Sampling: penalties by the tokens before a draw, the distribution of temperature, top-k, top-p and min-p, and draws
from it by sequence and position."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.history import History, occurrences
from moespec_jax.errors import RequestError, wrong_type
from moespec_jax.nn.best_tokens import BestTokens
from moespec_jax.nn.top_k import top_k
from moespec_jax.parallel.collectives import first_sequence

# Logits divided by less may overflow float32. At this temperature a token whose logit is lower by 1e-28, far less than
# one unit in the last place of any logit of usual size, has probability 0: the distribution is the greedy one.
_COLDEST = 1e-30
# The smallest normal float32: a smaller number counts as 0 in comparisons on most devices.
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


# Function of the tokens before a draw and of the target's logits [vocab] there, which returns other logits.
LogitsProcessor = Callable[[History, Array], Array]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Distribution that tokens are drawn from.

    Fields:
        temperature: divides the logits; 0 is greedy, and so are values whose quotients float32 cannot represent.
        top_k: number of most probable tokens to draw from; 0 is all.
        top_p: draw from the smallest set of most probable tokens that holds this probability; 1 is all.
        min_p: draw from the tokens of at least this share of the most probable one's probability; 0 is all.
        repetition_penalty: positive logits of tokens of prompt and text so far are divided by it, and negative ones
            multiplied (as transformers does; after arXiv:1909.05858, section 4.1); 1 is none.
        presence_penalty: subtracted from the logits of tokens that were generated before.
        frequency_penalty: subtracted from them once for each time that they were generated.
        logits_processor: changes the logits before all of these; a pure function, which is compared by identity.

    Raises:
        RequestError: a value has a wrong type, or is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self) if field.name != "logits_processor"):
            kind, expected = (Integral, "a whole number") if name == "top_k" else (Real, "a number")
            if not isinstance(getattr(self, name), kind):
                raise wrong_type(name, expected, getattr(self, name))
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise wrong_type("logits_processor", "a function", self.logits_processor)
        inf = math.inf
        for name, in_range, expected in (
            ("temperature", 0.0 <= self.temperature < inf, "a temperature of at least 0"),
            ("top_k", self.top_k >= 0, "top_k of at least 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "top_p above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "min_p from 0 to 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < inf, "a repetition_penalty above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite presence_penalty"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite frequency_penalty"),
        ):
            if not in_range:
                raise RequestError(f"expected {expected}, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always drawn."""
        return self.temperature < _COLDEST

    @property
    def best_suffices(self) -> bool:
        """True if a draw depends on nothing of the logits but the most probable token."""
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        return self.greedy and not penalised and self.logits_processor is None


def log_probabilities(sampling: SamplingConfig, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """Compute the log of the distribution, in float32; excluded tokens are -inf.

    The order is that of transformers: temperature, top-k, top-p, min-p. Greedy puts all mass on the first maximum.
    """
    logits = logits.astype(jnp.float32)
    if sampling.greedy:
        best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.bool_)
        return jnp.where(best, 0.0, -jnp.inf)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        logits = jnp.where(_outside_nucleus(logits, sampling.top_p), -jnp.inf, logits)
    if sampling.min_p > 0.0:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def sequence_keys(key: Array, batch: int) -> Array:
    """Random key of each of this device's `batch` sequences, from that of the whole batch and the sequence's place."""
    place = first_sequence(batch) + jnp.arange(batch, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, place)


def token_noise(key: Array, position: Int[Array, ""], vocab_size: int) -> Float[Array, " vocab"]:
    """Make the Gumbel noise of the token at a `position` of the sequence of this key.

    It is a function of these two alone, so that a position has one draw, whichever pass, round or call computes its
    logits.
    """
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)


def processed(sampling: SamplingConfig, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
    """Apply the processor and the penalties to the logits after a history."""
    if sampling.logits_processor is not None:
        logits = sampling.logits_processor(history, logits)
    if sampling.repetition_penalty != 1.0:
        logits, penalty = logits.astype(jnp.float32), sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(occurrences(history, logits.shape[0]) > 0, penalised, logits)
    if sampling.presence_penalty or sampling.frequency_penalty:
        count = occurrences(history, logits.shape[0], history.prompt_length).astype(jnp.float32)
        present = jnp.minimum(count, 1.0)
        logits = logits.astype(jnp.float32) - sampling.presence_penalty * present - sampling.frequency_penalty * count
    return logits


def batch_noise(
    key: Array, positions: Int[Array, "batch places"], vocab_size: int
) -> Float[Array, "batch places vocab"]:
    """Make the noise of the tokens at some positions of every sequence; `key` is that of the whole batch."""
    of_sequence = jax.vmap(token_noise, in_axes=(None, 0, None))
    return jax.vmap(of_sequence, in_axes=(0, 0, None))(sequence_keys(key, len(positions)), positions, vocab_size)


def draw_token(
    sampling: SamplingConfig, key: Array, logits: Float[Array, " vocab"] | BestTokens, history: History
) -> Int[Array, ""]:
    """Draw the token after a history in the sequence of this key: the most probable one or, where tokens are sampled,
    the one with the largest sum of log-probability and noise. Where the best token suffices, it can take the place of
    logits."""
    if isinstance(logits, BestTokens):
        assert sampling.best_suffices
        return logits.ids
    logits = processed(sampling, logits, history)
    if not sampling.greedy:
        logits = log_probabilities(sampling, logits) + token_noise(key, history.length, logits.shape[0])
    return jnp.argmax(logits).astype(jnp.int32)


def draw(
    sampling: SamplingConfig, key: Array, logits: Float[Array, "batch vocab"] | BestTokens, histories: History
) -> Int[Array, " batch"]:
    """Draw the token after the history of every sequence; `key` is that of the whole batch."""
    keys = sequence_keys(key, len(histories.length))
    return jax.vmap(partial(draw_token, sampling))(keys, logits, histories)


def _outside_nucleus(logits: Array, top_p: float) -> Array:
    """Mark tokens outside the smallest set of most probable tokens that holds at least `top_p` of the mass."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    sorted_probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    outside = before >= max(top_p, _SMALLEST)
    return jax.lax.platform_dependent(outside, order, cpu=arranged_by_scatter, default=arranged_by_sort)


def arranged_by_sort(marks: Array, ids: Array) -> Array:
    """Arrange marks of tokens, which are in the order of `ids`, by ascending id."""
    return jnp.take_along_axis(marks, jnp.argsort(ids, axis=-1), axis=-1)


def arranged_by_scatter(marks: Array, ids: Array) -> Array:
    """Compute `arranged_by_sort` without a second sort of the vocabulary, which is two fifths of the time of top-p on
    CPUs; TPUs scatter slowly."""
    return jnp.put_along_axis(jnp.zeros_like(marks), ids, marks, axis=-1, inplace=False)
