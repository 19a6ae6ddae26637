"""The law of sampled output: what a loop draws against the target's enumerated probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from speculation import Decoding, FastPrograms, decode

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding import autoregressive
from moespec_jax.decoding.sampling import SamplingConfig, log_probabilities
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.runtime import run as run_module

Target = tuple[DecoderConfig, Decoder, Backend]
ROWS = 2048


def just_enough_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and caches of thousands of short sequences are not filled up further than a power of two."""
    monkeypatch.setattr(run_module, "SMALLEST_CACHE", 1)
    monkeypatch.setattr(autoregressive, "SMALLEST_BUCKET", 1)


def probabilities(target: Target, sampling: SamplingConfig, prompt: list[int], new: int) -> np.ndarray:
    """The target's probability of every continuation of `new` tokens, by running each as plain text."""
    config, params, backend = target
    paths = np.array(list(np.ndindex(*(config.vocab_size,) * new)), np.int32)
    ids = np.concatenate([np.tile(np.array(prompt, np.int32), (len(paths), 1)), paths], axis=1)

    def score(params: Decoder, ids: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :], ids.shape)
        cache = empty_cache(config, ids.shape[0], ids.shape[1], jnp.float32, stacked=backend.stacked)
        mask = causal_mask(positions, ids.shape[1])
        hidden, _, _ = forward(config, params, ids, positions, mask, cache, backend)
        logs = log_probabilities(sampling, unembed(params, hidden))[:, len(prompt) - 1 : -1]
        return jnp.sum(jnp.take_along_axis(logs, ids[:, len(prompt) :, None], axis=2)[..., 0], axis=1)

    return np.exp(np.asarray(fast_jit(score)(params, jnp.asarray(ids)), np.float64))


def check(
    target: Target, decoding: Decoding, sampling: SamplingConfig, prompt: list[int], seeds: int, new: int = 3
) -> float:
    """Check the `new` tokens of the whole loop, `ROWS` sequences a seed, against enumerated probabilities; returns the
    number of drafts that the last seed accepted.

    The total variation is below twice the mean of direct sampling, whose own spread is a tenth of that mean: a sound
    loop fails once in far more than a million runs.
    """
    expected = probabilities(target, sampling, prompt, new)
    np.testing.assert_allclose(expected.sum(), 1.0, atol=1e-5)  # sums of float32 logarithms
    programs, counts, accepted = FastPrograms(), np.zeros(len(expected)), 0.0
    for seed in range(seeds):
        run = decode(decoding, programs, [prompt] * ROWS, new, seed=seed)
        digits = np.array([sequence[-new:] for sequence in run.sequences])
        counts += np.bincount(digits @ target[0].vocab_size ** np.arange(new - 1, -1, -1), minlength=len(expected))
        accepted = float(run.accepted.sum())
    draws = counts.sum()
    direct = np.random.default_rng(0).multinomial(int(draws), expected / expected.sum(), size=20) / draws
    floor = np.abs(direct - expected[None]).sum(axis=1).mean() / 2
    assert np.abs(counts / draws - expected).sum() / 2 < 2 * floor
    return accepted
