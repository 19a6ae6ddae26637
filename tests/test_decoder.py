"""Laws of the forward pass: trees, padding, stacked layers, caches filled in pieces, and no needless compilation."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import FAST_COMPILE, build, cached_logits, continue_greedily, fast_jit, positions_of, random_tensors

from moespec_jax.config import DecoderConfig, RopeConfig
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.states import Prompts
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.cache import Cache, empty_cache
from moespec_jax.nn.decoder import Decoder, forward, layer_runs, unembed

CONFIG = DecoderConfig(
    model_type="qwen2_moe",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=20,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    sparse_layers=(True, False, True),
    sliding_windows=(0, 4, 3),
    qkv_bias=True,
    shared_expert_intermediate_size=8,
)
TENSORS = random_tensors(CONFIG, seed=1)
SLOTS = 32
TOLERANCE = 1e-5  # on hidden states of standard deviation 1: sums in another order
both_backends = pytest.mark.parametrize("backend", [BACKENDS["switch"], BACKENDS["slots"]], ids=lambda b: b.name)


def ids_of(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, tokens)).astype(np.int32)


@functools.lru_cache
def runner(backend: Backend) -> Callable[..., tuple[jax.Array, Cache]]:
    """One pass over the weights above: `(cache, ids, positions, mask, valid) -> (hidden, cache)`."""

    def run(params: Decoder, cache: Any, ids: Any, positions: Any, mask: Any, valid: Any = None) -> Any:
        return forward(CONFIG, params, ids, positions, mask, cache, backend, valid=valid)[:2]

    return partial(fast_jit(run), build(CONFIG, TENSORS, backend))


def fresh(backend: Backend, batch: int) -> Cache:
    return empty_cache(CONFIG, batch, SLOTS, jnp.float32, stacked=backend.stacked)


def one_shot(backend: Backend, ids: np.ndarray) -> tuple[jax.Array, Cache]:
    """Hidden states and cache of whole sequences in one causal pass."""
    positions = positions_of(ids)
    return runner(backend)(fresh(backend, len(ids)), jnp.asarray(ids), positions, causal_mask(positions, SLOTS))


# The last path, 0-2-4-5-6, is longer than the windows and its nodes are not in neighbouring slots.
PARENTS = (-1, 0, 0, 2, 2, 4, 5)


def path_to(node: int) -> list[int]:
    return ([] if PARENTS[node] < 0 else path_to(PARENTS[node])) + [node]


@pytest.mark.slow_except("slots")
@both_backends
def test_a_tree_equals_its_paths_run_alone(backend: Backend) -> None:
    """Two prefixes of different lengths, one tree after both; windows cut through prefix and tree."""
    lengths, nodes = (5, 9), len(PARENTS)
    prefixes, tree = ids_of(2, 9), ids_of(2, nodes, seed=1)
    _, cache = one_shot(backend, prefixes)
    cache = cache.replace(length=jnp.array(lengths, jnp.int32))
    depths = np.array([len(path_to(node)) - 1 for node in range(nodes)])
    positions = np.array(lengths)[:, None] + depths[None, :]
    mask = np.zeros((2, nodes, SLOTS), bool)
    for b, length in enumerate(lengths):
        mask[b, :, :length] = True
        for node in range(nodes):
            mask[b, node, [length + other for other in path_to(node)]] = True
    hidden, _ = runner(backend)(cache, jnp.asarray(tree), jnp.asarray(positions, jnp.int32), jnp.asarray(mask))
    for b, length in enumerate(lengths):
        for node in range(nodes):
            path = np.concatenate([prefixes[b, :length], tree[b, path_to(node)]])
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(path)] = path
            alone, _ = one_shot(backend, padded)
            np.testing.assert_allclose(hidden[b, node], alone[0, len(path) - 1], atol=TOLERANCE, err_msg=str(node))


@pytest.mark.slow
@both_backends
def test_padding_changes_nothing(backend: Backend) -> None:
    """What stands in the padding changes no bit; how much of it there is, nothing beyond rounding."""
    lengths, run = (4, 11, 7), runner(backend)
    ids = ids_of(3, 12)
    valid = np.arange(12)[None, :] < np.array(lengths)[:, None]
    positions = positions_of(ids)
    rest = (positions, causal_mask(positions, SLOTS), jnp.asarray(valid))
    hidden, _ = run(fresh(backend, 3), jnp.asarray(ids), *rest)
    other, _ = run(fresh(backend, 3), jnp.where(valid, ids, ids_of(3, 12, seed=9)), *rest)
    np.testing.assert_array_equal(np.asarray(hidden)[valid], np.asarray(other)[valid])
    for b, length in enumerate(lengths):
        alone, _ = one_shot(backend, ids[b : b + 1, :length])
        np.testing.assert_allclose(hidden[b, :length], alone[0], atol=TOLERANCE)


@both_backends
def test_unused_slots_of_the_cache_change_nothing(backend: Backend) -> None:
    ids = ids_of(2, 6)
    positions = positions_of(ids)
    arguments = (jnp.asarray(ids), positions, causal_mask(positions, SLOTS))
    clean, run = fresh(backend, 2), runner(backend)
    dirty = jax.tree.map(lambda a: jnp.full_like(a, 1e4), clean).replace(length=clean.length)
    np.testing.assert_array_equal(run(clean, *arguments)[0], run(dirty, *arguments)[0])


@pytest.mark.slow_except("sparse1", "sparse2")
@pytest.mark.parametrize("sparse", [(True,) * 3, (False,) * 3, (False, True, True), (True, False, True)])
def test_stacked_equals_unrolled(sparse: tuple[bool, ...]) -> None:
    config = dataclasses.replace(CONFIG, sparse_layers=sparse)
    tensors, ids = random_tensors(config, seed=2), ids_of(2, 10)
    unrolled, stacked = (
        cached_logits(config, build(config, tensors, BACKENDS[name]), BACKENDS[name], ids)
        for name in ("switch", "slots")
    )
    np.testing.assert_allclose(unrolled, stacked, atol=TOLERANCE)
    assert unrolled.std() > 0.3


def test_without_a_cache() -> None:
    backend, ids = BACKENDS["switch"], ids_of(2, 10)
    params, positions = build(CONFIG, TENSORS, backend), positions_of(ids)
    mask = causal_mask(positions, 10)
    run = fast_jit(lambda params: forward(CONFIG, params, jnp.asarray(ids), positions, mask, None, backend)[0])
    np.testing.assert_allclose(run(params), one_shot(backend, ids)[0], atol=TOLERANCE)


def test_layer_runs_cover_the_layers_in_order() -> None:
    sparse = (False, True, True, False, False, True)
    config = dataclasses.replace(CONFIG, num_hidden_layers=6, sparse_layers=sparse, sliding_windows=(0,) * 6)
    assert layer_runs(config) == [range(0, 1), range(1, 3), range(3, 5), range(5, 6)]


@pytest.mark.slow_except("1-slots")
@both_backends
@pytest.mark.parametrize("chunk", [1, 4])
def test_prefill_in_chunks_equals_one_shot(backend: Backend, chunk: int) -> None:
    """Prompts of different lengths: each one's rows of the cache, and the hidden state of its last token."""
    lengths, ids = np.array([12, 5, 8], np.int32), ids_of(3, 12)
    prefill, params = Autoregressive(CONFIG, SamplingConfig(), backend).prefill, build(CONFIG, TENSORS, backend)
    read, state = fast_jit(prefill.read), prefill.init(params, 3, SLOTS)
    for start in range(0, 12, chunk):
        state = read(params, state, jnp.asarray(ids[:, start : start + chunk]), jnp.int32(start), jnp.asarray(lengths))
    hidden, cache = one_shot(backend, ids)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(state.last_hidden[b], hidden[b, length - 1], atol=TOLERANCE)
        stores = ((c.k, c.v) for c in (state.cache, cache))
        for ours, whole in zip(*map(jax.tree.leaves, stores), strict=True):
            np.testing.assert_allclose(ours[..., b, :, :length, :], whole[..., b, :, :length, :], atol=TOLERANCE)


def test_prefill_in_chunks_rotates_by_each_prompt_s_length() -> None:
    """Dynamic scaling beyond the context: the first chunk must know how long a prompt is, and its neighbour's length
    must not matter."""
    rope = RopeConfig(rope_type="dynamic", factor=4.0)
    config, backend = dataclasses.replace(CONFIG, rope=rope, max_position_embeddings=8), BACKENDS["switch"]
    params, ids, lengths = build(config, TENSORS, backend), ids_of(2, 12), np.array([12, 7], np.int32)
    prefill = Autoregressive(config, SamplingConfig(), backend).prefill
    read, state = fast_jit(prefill.read), prefill.init(params, 2, SLOTS)
    for start in range(0, 12, 4):
        state = read(params, state, jnp.asarray(ids[:, start : start + 4]), jnp.int32(start), jnp.asarray(lengths))
    alone = [cached_logits(config, params, backend, ids[b : b + 1, :length])[0, -1] for b, length in enumerate(lengths)]
    np.testing.assert_allclose(unembed(params, state.last_hidden), np.stack(alone), atol=TOLERANCE)


@both_backends
def test_one_token_steps_equal_one_shot(backend: Backend) -> None:
    ids, run = ids_of(2, 8), runner(backend)
    hidden, _ = one_shot(backend, ids)
    cache = fresh(backend, 2)
    for t in range(8):
        positions = jnp.full((2, 1), t, jnp.int32)
        one, cache = run(cache, jnp.asarray(ids[:, t : t + 1]), positions, causal_mask(positions, SLOTS))
        cache = cache.replace(length=cache.length + 1)
        np.testing.assert_allclose(one[:, 0], hidden[:, t], atol=TOLERANCE)


@pytest.mark.slow_except("slots")
@both_backends
def test_a_batch_decodes_as_its_sequences_alone(backend: Backend) -> None:
    params = build(CONFIG, TENSORS, backend)
    prompts = [ids_of(1, length, seed=length)[0].tolist() for length in (7, 1, 4)]
    run = partial(continue_greedily, CONFIG, params, backend, new=12, slots=SLOTS)
    together = run(prompts)
    assert together == [run([prompt])[0] for prompt in prompts]
    whole = np.zeros((3, 7 + 12), np.int32)
    for row, prompt, new in zip(whole, prompts, together, strict=True):
        row[: len(prompt) + 12] = prompt + new
    logits = cached_logits(CONFIG, params, backend, whole)
    for row, prompt, new in zip(logits, prompts, together, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 11].argmax(-1).tolist() == new


def test_tied_embeddings_unembed_with_the_embedding() -> None:
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    tensors = {name: value for name, value in TENSORS.items() if name != "lm_head.weight"}
    for config, held, head in ((tied, tensors, "model.embed_tokens.weight"), (CONFIG, TENSORS, "lm_head.weight")):
        logits = unembed(build(config, held, BACKENDS["switch"]), hidden)
        np.testing.assert_allclose(logits, np.asarray(hidden) @ TENSORS[head].T, atol=1e-5)


def test_one_trace_per_setting() -> None:
    """Other prompts, lengths, limits, stop ids, seeds and numbers of steps: nothing is traced again."""
    traces: dict[str, int] = {}

    params = build(CONFIG, TENSORS, BACKENDS["switch"])

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*arguments: Any) -> Any:
            traces[function.__name__] = traces.get(function.__name__, 0) + 1
            return function(*arguments)

        return partial(jax.jit(traced, compiler_options=FAST_COMPILE), params)

    method = Autoregressive(CONFIG, SamplingConfig(temperature=0.7, top_k=5), BACKENDS["switch"])
    read, start, go_on = (counted(f) for f in (method.prefill.read, method.begin, method.step))
    for number, lengths in enumerate(([3, 8], [8, 1], [16, 9])):
        prompt_lengths, ids = jnp.array(lengths, jnp.int32), ids_of(2, 16, seed=number)
        state = method.prefill.init(params, 2, SLOTS)
        for chunk in range(0, max(lengths), 8):
            state = read(state, jnp.asarray(ids[:, chunk : chunk + 8]), jnp.int32(chunk), prompt_lengths)
        tokens = jnp.pad(jnp.asarray(ids), ((0, 0), (0, SLOTS - 16)))
        stop_ids, key = jnp.array([number], jnp.int32), jax.random.key(number)
        decoding = start(state, Prompts(tokens, prompt_lengths, prompt_lengths + 9, stop_ids, key))
        for steps in (1, 2, number + 3, 100):
            decoding, _ = go_on(decoding, jnp.int32(steps))
        assert bool(jnp.all(decoding.done))
    assert traces == {"read": 1, "begin": 1, "step": 1}


@pytest.mark.slow_except("1.0")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_how_the_loop_is_cut(temperature: float) -> None:
    method = Autoregressive(CONFIG, SamplingConfig(temperature), BACKENDS["switch"])
    params, lengths = build(CONFIG, TENSORS, BACKENDS["switch"]), jnp.array([4, 2], jnp.int32)
    ids = ids_of(2, 4)
    state = method.prefill.init(params, 2, SLOTS)
    state = fast_jit(method.prefill.read)(params, state, jnp.asarray(ids), jnp.int32(0), lengths)
    tokens = jnp.pad(jnp.asarray(ids), ((0, 0), (0, SLOTS - 4)))
    prompts = Prompts(tokens, lengths, lengths + 15, jnp.full((1,), -1, jnp.int32), jax.random.key(4))
    first = fast_jit(method.begin)(params, state, prompts)
    run = fast_jit(method.step)
    whole, _ = run(params, first, jnp.int32(100))
    cut = first
    for steps in (1, 4, 2, 50):
        cut, _ = run(params, cut, jnp.int32(steps))
    for row, length in enumerate([19, 17]):
        assert whole.tokens[row, :length].tolist() == cut.tokens[row, :length].tolist()
    assert cut.length.tolist() == [19, 17]
