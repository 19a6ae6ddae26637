"""Running a decoder from a test: logits of whole sequences, and greedy decoding by the steps of `Autoregressive`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.checkpoint.leaves import Source, load_source
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.history import History
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.states import Prompts
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, forward, unembed

# Tests compile hundreds of programs that run for a millisecond: have LLVM emit them as they come.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def at(positions: jax.Array) -> History:
    """Histories that end before these positions; without penalties, their tokens do not matter."""
    return History(jnp.zeros((*positions.shape, 0), jnp.int32), positions, positions)


def fast_jit(function: Any, **options: Any) -> Any:
    """`jax.jit` that compiles quickly and runs slowly."""
    return jax.jit(function, compiler_options=FAST_COMPILE, **options)


def random_tensors(config: DecoderConfig, seed: int) -> dict[str, np.ndarray]:
    """Random published tensors: matrices of about unit gain, norms around 1, everything else around 0."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, tensor in tensor_table(config).items():
        values = rng.normal(size=tensor.shape).astype(np.float32)
        scale = np.float32(tensor.shape[-1] ** -0.5 if len(tensor.shape) > 1 else 0.2)
        tensors[name] = values * scale + np.float32("norm" in name)
    return tensors


def build(config: DecoderConfig, tensors: dict[str, np.ndarray], backend: Backend) -> Decoder:
    """The parameters that these published tensors make under a back-end."""
    source = Source(
        {name: np.dtype(np.float32) for name in tensors},
        lambda names: ((n, tensors[n]) for n in names),
        tensor_table(config),
    )
    return load_source(source, config, backend, jnp.float32)


def positions_of(ids: np.ndarray) -> jax.Array:
    """0, 1, 2, ... in every row."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :], ids.shape)


def cached_logits(
    config: DecoderConfig, params: Decoder, backend: Backend, ids: np.ndarray, spare: int = 3
) -> np.ndarray:
    """Logits of all positions by one compiled pass that writes a cache with `spare` slots too many."""

    def run(params: Decoder, ids: jax.Array) -> jax.Array:
        positions, slots = positions_of(ids), ids.shape[1] + spare
        cache = empty_cache(config, ids.shape[0], slots, jnp.float32, stacked=backend.stacked)
        hidden, _, _ = forward(config, params, ids, positions, causal_mask(positions, slots), cache, backend)
        return unembed(params, hidden)

    return np.asarray(fast_jit(run)(params, jnp.asarray(ids, jnp.int32)))


def continue_greedily(
    config: DecoderConfig,
    params: Decoder,
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    new: int,
    chunk: int = 4,
    slots: int = 128,
) -> list[list[int]]:
    """`new` tokens after each prompt, all prompts as one batch, prefilled in chunks of `chunk` tokens."""
    method = Autoregressive(config, SamplingConfig(), backend)
    read, begin, step = _greedy_programs(method)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    chunks = -(-int(lengths.max()) // chunk)
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = method.prefill.init(params, len(prompts), slots)
    for start in range(0, chunks * chunk, chunk):
        state = read(
            params, state, jnp.asarray(tokens[:, start : start + chunk]), jnp.int32(start), jnp.asarray(lengths)
        )
    limit = jnp.asarray(lengths + new)
    no_stop = jnp.full((1,), -1, jnp.int32)
    given = Prompts(jnp.asarray(tokens), jnp.asarray(lengths), limit, no_stop, jax.random.key(0))
    decoding, info = step(params, begin(params, state, given), jnp.int32(new))
    assert int(info.rounds) == new - 1 and bool(jnp.all(decoding.done))
    return [row[n : n + new].tolist() for row, n in zip(np.asarray(decoding.tokens), lengths, strict=True)]


@lru_cache
def _greedy_programs(method: Autoregressive) -> tuple[Any, Any, Any]:
    return fast_jit(method.prefill.read), fast_jit(method.begin), fast_jit(method.step)
