"""Sampling: the distribution of temperature, top-k and top-p, and draws from it by sequence and position."""

import dataclasses
from functools import partial
from numbers import Integral, Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.errors import RequestError, wrong_type
from moespec_jax.nn.top_k import top_k
from moespec_jax.parallel.collectives import first_sequence

# Logits divided by less may overflow float32. At this temperature a token whose logit is lower by 1e-28, far less than
# one unit in the last place of any logit of usual size, has probability 0: the distribution is the greedy one.
_COLDEST = 1e-30
# The smallest normal float32: a smaller number counts as 0 in comparisons on most devices.
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Distribution that tokens are drawn from.

    Fields:
        temperature: divides the logits; 0 is greedy, and so are values whose quotients float32 cannot represent.
        top_k: number of most probable tokens to draw from; 0 is all.
        top_p: draw from the smallest set of most probable tokens that holds this probability; 1 is all.

    Raises:
        RequestError: a value has a wrong type, or is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, kind, expected in (
            ("temperature", Real, "a number"), ("top_k", Integral, "a whole number"), ("top_p", Real, "a number")
        ):  # fmt: skip
            if not isinstance(getattr(self, name), kind):
                raise wrong_type(name, expected, getattr(self, name))
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"expected a temperature of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"expected top_k of at least 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"expected top_p above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always drawn."""
        return self.temperature < _COLDEST


def log_probabilities(sampling: SamplingConfig, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """Compute the log of the distribution, in float32; excluded tokens are -inf.

    The order is that of transformers: temperature, top-k, top-p. Greedy puts all mass on the first maximum.
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


def draw_token(
    sampling: SamplingConfig, key: Array, logits: Float[Array, " vocab"], position: Int[Array, ""]
) -> Int[Array, ""]:
    """Draw the token at a `position` of the sequence of this key: the most probable one or, where tokens are sampled,
    the one with the largest sum of log-probability and noise."""
    if not sampling.greedy:
        logits = log_probabilities(sampling, logits) + token_noise(key, position, logits.shape[0])
    return jnp.argmax(logits).astype(jnp.int32)


def draw(
    sampling: SamplingConfig, key: Array, logits: Float[Array, "batch vocab"], position: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """Draw the token at a `position` of every sequence; `key` is that of the whole batch."""
    keys = sequence_keys(key, logits.shape[0])
    return jax.vmap(partial(draw_token, sampling))(keys, logits, position)


def _outside_nucleus(logits: Array, top_p: float) -> Array:
    """Mark tokens outside the smallest set of most probable tokens that holds at least `top_p` of the mass."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    sorted_probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    return jnp.take_along_axis(before >= max(top_p, _SMALLEST), jnp.argsort(order, axis=-1), axis=-1)
