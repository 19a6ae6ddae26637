"""Derivatives and `vmap` through the decoder: those of `dense` against transformers' in torch and against differences
of the decoder in NumPy and float64; back-ends without gradients refuse them in one line."""

import dataclasses
import functools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import build, fast_jit, positions_of, random_tensors
from flat_experts import flat_from_per_expert
from hf_models import FAMILIES, draw_fields, write_checkpoint
from safetensors.numpy import load_file
from slow_decoder import SlowDecoder, chain
from test_decoder import CONFIG as EVERY_KIND

from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.checkpoint.write import decoder_source
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import RequestError
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, forward, unembed

DENSE = BACKENDS["dense"]
TOKENS = 9
# Every layer sparse, full attention, no shared expert: what the slow decoder computes.
SIMPLE = dataclasses.replace(
    EVERY_KIND,
    num_hidden_layers=2,
    sparse_layers=(True, True),
    sliding_windows=(0, 0),
    qkv_bias=False,
    shared_expert_intermediate_size=0,
    qk_norm="head",
)

SMALL = dataclasses.replace(EVERY_KIND, num_hidden_layers=2, sparse_layers=(True, False), sliding_windows=(0, 4))


def logits_of(config: DecoderConfig, backend: Backend, params: Decoder, ids: jax.Array) -> jax.Array:
    """Causal logits; with a cache where layers are stacked."""
    positions = positions_of(np.zeros(ids.shape))
    cache = empty_cache(config, len(ids), ids.shape[1], jnp.float32, stacked=True) if backend.stacked else None
    hidden, _, _ = forward(config, params, ids, positions, causal_mask(positions, ids.shape[1]), cache, backend)
    return unembed(params, hidden)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ids_of(batch: int, vocabulary: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).integers(0, vocabulary, (batch, TOKENS)), jnp.int32)


@pytest.mark.torch
@pytest.mark.slow_except("qwen3_moe")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """With respect to every published tensor, of a random linear function of the logits."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    # torch leaves out the gradient of the embedding of a padding token.
    fields = draw_fields(family, 4) | {"pad_token_id": None}
    model = write_checkpoint(tmp_path / "model", fields, seed=11)
    config = load_config(tmp_path / "model")
    params = load_parameters(tmp_path / "model", config, DENSE, jnp.float32)
    ids, weight = ids_of(2, config.vocab_size), draw(2, TOKENS, config.vocab_size)
    ours = fast_jit(jax.grad(lambda p: jnp.sum(logits_of(config, DENSE, p, ids) * weight)))(params)
    (model(torch.tensor(np.array(ids)), use_cache=False).logits * torch.tensor(np.array(weight))).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    # Saved, so that the gradients have the published names and orientations too.
    model.save_pretrained(tmp_path / "gradient")
    expected, source = load_file(tmp_path / "gradient" / "model.safetensors"), decoder_source(ours, config)
    found = dict(source.read(list(source.dtypes)))
    assert set(found) == set(expected) and any("mlp.gate." in n or "block_sparse_moe.gate" in n for n in found)
    for name, theirs in expected.items():
        scale = np.abs(theirs).max() or 1.0
        assert theirs.any() or "experts" in name, name
        np.testing.assert_allclose(found[name] / scale, theirs / scale, atol=1e-4, rtol=0, err_msg=name)


@functools.cache
def simple_sample() -> tuple[Decoder, jax.Array, jax.Array, Decoder]:
    """Parameters, ids, the weights of their logits in a sum, and the gradient of that sum."""
    params = build(SIMPLE, random_tensors(SIMPLE, seed=2), BACKENDS["switch"])
    ids, weight = ids_of(1, SIMPLE.vocab_size), draw(1, TOKENS, SIMPLE.vocab_size, seed=3)

    def scalar(params: Decoder) -> jax.Array:
        flat = params.replace(experts=flat_from_per_expert(params.experts))
        return jnp.sum(logits_of(SIMPLE, DENSE, flat, ids) * weight)

    return params, ids, weight, fast_jit(jax.grad(scalar))(params)


@pytest.mark.parametrize("part", ["embed", "attention", "router", "experts", "norm", "lm_head"])
def test_gradients_are_those_of_differences(part: str) -> None:
    """Along a random direction in one part of the parameters; the other decoder is NumPy in float64."""
    params, ids, weight, gradient = simple_sample()

    def direction(path: Any, leaf: Any) -> np.ndarray:
        moved = part in (getattr(step, "name", None) for step in path)
        return np.random.default_rng(leaf.size).normal(size=leaf.shape) * moved

    along = jax.tree_util.tree_map_with_path(direction, params)
    ours = sum(np.sum(a * np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (along, gradient)), strict=True))

    def moved(step: float) -> float:
        there = jax.tree.map(lambda leaf, a: np.asarray(leaf, np.float64) + step * a, params, along)
        logits, _ = SlowDecoder(SIMPLE, there).read(np.asarray(ids[0]).tolist(), chain(TOKENS))
        return float(np.sum(logits * np.asarray(weight[0], np.float64)))

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(expected) > 1
    assert ours == pytest.approx(expected, rel=1e-4)


def sample(backend: Backend) -> tuple[Decoder, Any]:
    """Parameters, and a function from them to a scalar."""
    params, ids = build(EVERY_KIND, random_tensors(EVERY_KIND, seed=1), backend), ids_of(2, 40)
    return params, lambda params: jnp.sum(logits_of(EVERY_KIND, backend, params, ids))


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"dense"}))
@pytest.mark.parametrize("transform", ["grad", "vjp", "grad of experts", "vmap of grad"])
def test_back_ends_without_gradients_name_the_one_that_has_them(name: str, transform: str) -> None:
    """While JAX traces: nothing is compiled or computed before."""
    params, scalar = sample(BACKENDS[name])
    of_embed = jax.grad(lambda embed: scalar(params.replace(embed=embed)))
    calls: dict[str, Any] = {
        "grad": (jax.grad(scalar), params),
        "vjp": (lambda params: jax.vjp(scalar, params)[1](jnp.float32(1)), params),
        "grad of experts": (jax.grad(lambda experts: scalar(params.replace(experts=experts))), params.experts),
        "vmap of grad": (jax.vmap(of_embed), params.embed[None]),
    }
    with pytest.raises(RequestError, match=rf"BACKENDS\['dense'\]\); '{name}' computes experts forward only") as raised:
        jax.eval_shape(*calls[transform])
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["switch", "slots"])
def test_forward_mode_and_vmap_are_those_of_dense(name: str) -> None:
    for ours, theirs in zip(derivatives(BACKENDS[name]), derivatives(DENSE), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def derivatives(backend: Backend) -> tuple[jax.Array, jax.Array]:
    """Logits of each sequence by `vmap`, and their derivatives along a change of the embedding."""
    params, ids = build(SMALL, random_tensors(SMALL, seed=1), backend), ids_of(3, SMALL.vocab_size)
    run = partial(logits_of, SMALL, backend)

    def along(direction: jax.Array) -> jax.Array:
        of_embedding = lambda embed: run(params.replace(embed=embed), ids[:1])  # noqa: E731
        return jax.jvp(of_embedding, (params.embed,), (direction,))[1]

    each = fast_jit(jax.vmap(lambda row: run(params, row[None])[0]))(ids)
    return each, fast_jit(along)(draw(*params.embed.shape))


def test_vmap_of_gradients_is_the_gradient_of_each_sequence() -> None:
    """With respect to embedding and experts, through everything between them."""
    params, ids = build(SMALL, random_tensors(SMALL, seed=1), DENSE), ids_of(2, SMALL.vocab_size)

    def scalar(embed: jax.Array, gate: jax.Array, row: jax.Array) -> jax.Array:
        changed = params.replace(embed=embed, experts=params.experts.replace(gate=gate))
        return jnp.sum(logits_of(SMALL, DENSE, changed, row[None]))

    one = partial(jax.grad(scalar, argnums=(0, 1)), params.embed, params.experts.gate)
    each, compiled = fast_jit(jax.vmap(one))(ids), fast_jit(one)
    for number, row in enumerate(ids):
        for several, alone in zip(each, compiled(row), strict=True):
            np.testing.assert_allclose(several[number], alone, atol=1e-4 * float(jnp.max(jnp.abs(alone))), rtol=0)


def test_stacked_layers_without_a_cache_are_refused_by_name() -> None:
    params, ids = build(EVERY_KIND, random_tensors(EVERY_KIND, seed=1), BACKENDS["slots"]), ids_of(1, 40)
    with pytest.raises(RequestError, match=r"empty_cache\).*BACKENDS\['dense'\]"):
        logits_of(EVERY_KIND, BACKENDS["slots"]._replace(stacked=False), params, ids)
