"""Random pairs of published shapes want about as many distinct experts as was published of the trained models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation import FastPrograms

from moespec_jax.bench.random_pair import (
    EXPONENTS,
    published_accept_length,
    random_pair,
    shapes_of,
    skewed,
)
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import random_decoder, random_rows
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.run import Batch, Run

BACKEND, TREE, PROMPTS = BACKENDS["slots"], TreeConfig(7, 10, 63), 4


def cut(model: str) -> tuple[DecoderConfig, DraftConfig]:
    """The experts of a published model, in a narrow target of two layers."""
    small = dict(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        vocab_size=8192, intermediate_size=8, moe_intermediate_size=8,
    )  # fmt: skip
    config, (_, draft) = read_config(MODELS[model] | small), shapes_of(model, 2)
    changes = dict(draft_vocab_size=8192, intermediate_size=16, boundaries=(0, 1, 2))
    own = draft_config(model, config, **changes)
    return config, dataclasses.replace(own, norm_before_residual=draft.norm_before_residual)


def routing(model: str, exponent: float, programs: FastPrograms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a tree for each of some random prompts: chances `[prompts, nodes]`, and of every layer the experts that nodes
    chose `[layers, prompts, nodes, k]` and the routers' softmax `[layers, prompts, nodes, experts]`."""
    config, draft = cut(model)
    pair = random_pair(config, draft, BACKEND, jnp.float32, exponent)
    accept = accept_rule(SamplingConfig(), TREE.longest_path, 3.0)
    method = Speculative(Autoregressive(config, SamplingConfig(), BACKEND), Eagle3Drafter(draft), TREE, accept)
    prompts = np.random.default_rng(0).integers(0, 8192, (PROMPTS, 16)).tolist()
    batch = Batch(prompts, [64] * PROMPTS, (), 0)
    state = Run(programs, method, pair, batch).state_after(0)
    trees, _ = programs.run(Speculative.propose, method, pair, state)
    _, _, info = programs.run(Speculative.verify, method, pair, state, trees)
    shape = (len(info.routers), PROMPTS, TREE.size, -1)
    chosen = np.stack([np.asarray(router.experts) for router in info.routers]).reshape(shape)
    mass = np.stack([np.asarray(router.probabilities) for router in info.routers]).reshape(shape)
    return np.asarray(trees.scores), chosen, mass


def union(chances: np.ndarray, chosen: np.ndarray, size: int) -> float:
    """Distinct experts of the `size` likeliest nodes: a smaller tree of the same draft."""
    best = np.argsort(-chances, axis=1, kind="stable")[:, :size]
    return float(
        np.mean([[len(np.unique(tree[rows])) for tree, rows in zip(layer, best, strict=True)] for layer in chosen])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, size, published",
    [("OLMoE-1B-7B", 31, 39), ("OLMoE-1B-7B", 63, 54), ("Qwen3-30B-A3B", 63, 80), ("Mixtral-8x7B", 63, 7.5)],
)
def test_trees_want_as_many_experts_as_published(model: str, size: int, published: float) -> None:
    chances, chosen, _ = measured(model, EXPONENTS[model])
    # Published figures are of one data set each, and these are of four trees.
    assert union(chances, chosen, size) == pytest.approx(published, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("model, size, published", [("OLMoE-1B-7B", 31, 39), ("Qwen3-30B-A3B", 63, 80)])
def test_without_the_skew_they_want_many_more(model: str, size: int, published: float) -> None:
    chances, chosen, _ = measured(model, 0.0)
    assert union(chances, chosen, size) > 1.15 * published


@pytest.mark.slow
def test_the_heaviest_half_of_olmoes_experts_holds_the_published_mass() -> None:
    _, _, mass = measured("OLMoE-1B-7B", EXPONENTS["OLMoE-1B-7B"])
    shares = -np.sort(-mass.sum(axis=2), axis=-1)
    held = shares[..., :32].sum(axis=-1) / shares.sum(axis=-1)
    assert held.mean() == pytest.approx(0.93, abs=0.03)


_MEASURED: dict[Any, Any] = {}
_PROGRAMS: dict[str, FastPrograms] = {}


def measured(model: str, exponent: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Once for all tests; with the programs of the model, whatever the exponent."""
    if (model, exponent) not in _MEASURED:
        _MEASURED[model, exponent] = routing(model, exponent, _PROGRAMS.setdefault(model, FastPrograms()))
    return _MEASURED[model, exponent]


@pytest.mark.parametrize("backend", ["switch", "slots"])
def test_the_constant_is_in_every_token_and_the_push_in_every_router(backend: str) -> None:
    config, _ = shapes_of("toy")
    plain = random_decoder(config, BACKENDS[backend], jax.random.key(0), jnp.float32)
    made = skewed(config, plain, 0.8, jax.random.key(1))
    assert np.unique(np.asarray(made.embed)[:, 0]).size == 1
    pushes = np.concatenate([np.asarray(layer.mlp.router)[..., 0].reshape(-1, 16) for layer in made.layers])
    # All ranks are there, in another order in every layer.
    np.testing.assert_allclose(np.sort(pushes), np.broadcast_to(np.sort(pushes[0]), pushes.shape), rtol=1e-6)
    assert len({tuple(np.argsort(row)) for row in pushes}) == len(pushes) == 3
    spread_out = skewed(config, plain, 0.0, jax.random.key(1))
    assert all((np.asarray(layer.mlp.router)[..., 0] == 0).all() for layer in spread_out.layers)


def test_simulated_lengths_grow_with_the_tree_to_its_longest_path() -> None:
    assert published_accept_length(TreeConfig(3, 1, 5)) == 2.3
    assert published_accept_length(TreeConfig(7, 10, 60)) == 3.7
    assert published_accept_length(TreeConfig(0, 60, 60)) == 2.0
    assert 1.0 <= published_accept_length(TreeConfig(0, 1, 2)) <= 2.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_matrices_are_drawn_without_a_second_copy(dtype: str) -> None:
    shape = (64, 256, 512)
    drawn = random_rows.lower(jax.random.key(0), shape, jnp.dtype(dtype), 0.5).compile()
    memory = drawn.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 0.2 * memory.output_size_in_bytes
    values = np.asarray(random_rows(jax.random.key(0), shape, jnp.dtype(dtype), 0.5), np.float64)
    atol = 0.01 if dtype == "bfloat16" else 1e-3  # JAX draws bfloat16 from 128 uniform numbers
    assert abs(values.mean()) < atol and abs(values.std() - 0.5) < atol
    assert len(np.unique(values[:, 0, :8], axis=0)) == shape[0]
