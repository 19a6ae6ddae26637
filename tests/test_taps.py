"""Auxiliary hidden states: what enters layer b is what a decoder of b layers leaves, unnormed; and what transformers
says."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import build, fast_jit, positions_of, random_tensors
from hf_models import FAMILIES, draw_fields, write_checkpoint
from jax import Array

from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, forward
from moespec_jax.nn.layers import add_norm, rms_norm

CONFIG = DecoderConfig(
    model_type="qwen2_moe",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=20,
    moe_intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    sparse_layers=(True, False, True, True),
    sliding_windows=(0, 4, 3, 0),
    qkv_bias=True,
    shared_expert_intermediate_size=8,
)
TENSORS = random_tensors(CONFIG, seed=1)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)
ALL = tuple(range(CONFIG.num_hidden_layers + 1))
TOLERANCE = 2e-5  # on states of about 1 to 5: sums in another order
both_backends = pytest.mark.parametrize("backend", [BACKENDS["switch"], BACKENDS["slots"]], ids=lambda b: b.name)


def run(
    config: DecoderConfig, params: Decoder, backend: Backend, ids: np.ndarray, boundaries: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Last hidden states, and those at the boundaries, by one pass over whole sequences with a cache."""
    batch, length = ids.shape

    def whole(params: Decoder) -> Any:
        positions = positions_of(ids)
        cache = empty_cache(config, batch, length, jnp.float32, stacked=backend.stacked)
        mask, tokens = causal_mask(positions, length), jnp.asarray(ids, jnp.int32)
        hidden, _, info = forward(config, params, tokens, positions, mask, cache, backend, boundaries=boundaries)
        return hidden, info.aux_hidden_states

    return fast_jit(whole)(params)


@functools.cache
def all_aux(backend: Backend) -> np.ndarray:
    """`[batch, tokens, boundary, model]` of every boundary at once."""
    aux = run(CONFIG, build(CONFIG, TENSORS, backend), backend, IDS, ALL)[1]
    return np.asarray(aux).reshape(*IDS.shape, len(ALL), CONFIG.hidden_size)


@pytest.fixture(scope="module")
def cut_states() -> list[np.ndarray]:
    """Hidden states that decoders of 0, 1, ... layers leave without a norm: the last norm alone is in float16."""

    def last_norm_left_out(x: Array, y: Array | None, weight: Array, eps: float) -> tuple[Array, Array]:
        if weight.dtype != jnp.float16:
            return add_norm(x, y, weight, eps)
        total = x if y is None else x + y
        return total, total

    backend = BACKENDS["switch"]._replace(add_norm=last_norm_left_out)
    states = [TENSORS["model.embed_tokens.weight"][IDS]]
    for layers in ALL[1:]:
        config = dataclasses.replace(
            CONFIG,
            num_hidden_layers=layers,
            sparse_layers=CONFIG.sparse_layers[:layers],
            sliding_windows=CONFIG.sliding_windows[:layers],
        )
        gone = tuple(f"model.layers.{i}." for i in range(layers, CONFIG.num_hidden_layers))
        kept = {name: tensor for name, tensor in TENSORS.items() if not name.startswith(gone)}
        params: Any = build(config, kept, backend)
        norm = params.norm.astype(jnp.float16)
        states.append(np.asarray(run(config, params.replace(norm=norm), backend, IDS, ())[0]))
    return states


@pytest.mark.slow_except("slots")
@both_backends
def test_every_boundary_is_what_a_shorter_decoder_leaves(backend: Backend, cut_states: list[np.ndarray]) -> None:
    aux = all_aux(backend)
    for b, expected in enumerate(cut_states):
        np.testing.assert_allclose(aux[:, :, b], expected, atol=TOLERANCE, err_msg=f"boundary {b}")
        assert all(np.abs(expected - other).max() > 0.1 for other in cut_states[:b])


@pytest.mark.slow_except("slots")
@both_backends
def test_some_boundaries_are_some_of_all_side_by_side(backend: Backend) -> None:
    some = (0, 2, 4)
    aux = run(CONFIG, build(CONFIG, TENSORS, backend), backend, IDS, some)[1]
    expected = all_aux(backend)[:, :, some].reshape(*IDS.shape, -1)
    np.testing.assert_allclose(aux, expected, atol=TOLERANCE)


@pytest.mark.slow_except("slots")
@both_backends
def test_boundaries_change_no_hidden_state(backend: Backend) -> None:
    params = build(CONFIG, TENSORS, backend)
    plain, aux = run(CONFIG, params, backend, IDS, ())
    with_aux, _ = run(CONFIG, params, backend, IDS, (1, 2))
    assert aux is None
    np.testing.assert_allclose(plain, with_aux, atol=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_auxiliary_states_equal_the_hidden_states_of_transformers(family: str, tmp_path: Path) -> None:
    """Whose last entry is the one after the last norm."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    model = write_checkpoint(tmp_path, draw_fields(family, 5), seed=3)
    ids = np.random.default_rng(5).integers(0, 64, (2, 12))
    with torch.no_grad():
        theirs = model(torch.tensor(ids), use_cache=False, output_hidden_states=True).hidden_states
    config, backend = load_config(tmp_path), BACKENDS["switch"]
    params = load_parameters(tmp_path, config, backend, jnp.float32)
    boundaries = tuple(range(config.num_hidden_layers + 1))
    aux = np.split(np.asarray(run(config, params, backend, ids, boundaries)[1]), len(boundaries), axis=-1)
    last = rms_norm(jax.device_put(aux[-1]), params.norm, config.rms_norm_eps)
    assert len(theirs) == len(boundaries)
    for b, (ours, expected) in enumerate(zip([*aux[:-1], last], theirs, strict=True)):
        np.testing.assert_allclose(ours, expected.numpy(), atol=5e-5, err_msg=f"boundary {b}")  # as of logits
