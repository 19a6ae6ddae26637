"""RMS norm, rotary embedding, gated MLP, attention and windows against float64 loops; rotary scalings against
transformers."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from driver import fast_jit
from hf_models import ROPES, draw_rope

from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.config import RopeConfig
from moespec_jax.nn.attention import attend, causal_mask, within_window
from moespec_jax.nn.layers import ACTIVATIONS, GatedMlp, apply_rope, gated_mlp, rms_norm, rope_angles, rope_frequencies


def angles(rope: RopeConfig, head_dim: int, context: int, positions: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine where the longest sequence ends with the largest position given."""
    return rope_angles(rope, head_dim, context, jnp.asarray(positions), jnp.int32(np.max(positions) + 1))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(size: float, eps: float) -> None:
    x, weight = draw(2, 3, 16) * np.float32(size), draw(16, seed=1)
    actual = rms_norm(jnp.asarray(x), jnp.asarray(weight), eps)
    np.testing.assert_allclose(np.asarray(actual), oracles.rms_norm(x, weight, eps), rtol=2e-6, atol=1e-6)


def test_rms_norm_of_bfloat16_is_taken_in_float32() -> None:
    """Only the normed row and its product with the weight are rounded to bfloat16's 8 bits."""
    x, weight = jnp.asarray(draw(4, 512), jnp.bfloat16), jnp.asarray(draw(512, seed=1), jnp.bfloat16)
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == jnp.bfloat16
    expected = oracles.rms_norm(np.asarray(x), np.asarray(weight), 1e-6)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2 * 2**-8)


@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_gated_mlp(activation: str) -> None:
    x, gate, up, down = draw(4, 8), draw(8, 6, seed=1), draw(8, 6, seed=2), draw(6, 8, seed=3)
    actual = gated_mlp(jnp.asarray(x), GatedMlp(*map(jnp.asarray, (gate, up, down))), activation)
    expected = oracles.gated_mlp(x, gate, up, down, activation)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=1e-4, rtol=1e-5)  # sums of about 100


def test_every_activation_has_an_oracle() -> None:
    assert set(ACTIVATIONS) - {"swish"} == set(oracles.ACTIVATIONS)
    x = jnp.asarray(draw(9))
    np.testing.assert_array_equal(ACTIVATIONS["swish"](x), ACTIVATIONS["silu"](x))


def test_default_frequencies_by_their_definition() -> None:
    frequencies, scale = rope_frequencies(RopeConfig(rope_theta=500.0), 12, 64)
    assert scale == 1.0
    np.testing.assert_allclose(frequencies, [500.0 ** (-2 * i / 12) for i in range(6)], rtol=1e-6)


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotation_is_complex_multiplication(rope_type: str) -> None:
    rope = read_rope(draw_rope(rope_type, np.random.default_rng(3), new_spelling=True), 10_000.0)
    positions = np.array([[0, 1, 5, 40], [7, 7, 100, 3]], np.int32)
    x = draw(2, 4, 3, 8)
    rotated = apply_rope(jnp.asarray(x), *angles(rope, 8, 512, positions))
    frequencies, scale = rope_frequencies(rope, 8, 512)
    for b in range(2):
        for t in range(4):
            expected = oracles.rotate(x[b, t], frequencies, int(positions[b, t])) * scale
            # A float32 angle of 100 is exact to 4e-6.
            np.testing.assert_allclose(np.asarray(rotated)[b, t], expected, atol=2e-5)


def test_scores_depend_on_distance_alone() -> None:
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(i: int, j: int) -> float:
        turned = [
            apply_rope(jnp.asarray(x), *angles(RopeConfig(), 8, 64, jnp.full((1, 1), p, jnp.int32)))
            for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 3), abs=1e-2)


@pytest.mark.torch
@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("rope_type", [rope for rope in ROPES if rope != "default"])
def test_frequencies_as_in_transformers(rope_type: str, number: int) -> None:
    pytest.importorskip("torch")
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    transformers.logging.set_verbosity_error()
    rng = np.random.default_rng([ROPES.index(rope_type), number])
    heads, context = 2 * int(rng.integers(2, 65)), int(rng.choice([16, 512, 4096]))
    fields = draw_rope(rope_type, rng, new_spelling=bool(number % 2))
    config = transformers.LlamaConfig(head_dim=heads, max_position_embeddings=context, **fields)
    rope = read_rope(fields, 10_000.0)
    for length in (1, context, 3 * context):
        expected, scale = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=length)
        cos, sin = angles(rope, heads, context, jnp.array([[1, length - 1]], jnp.int32))
        np.testing.assert_allclose(cos[0, 0], np.cos(expected.numpy()) * scale, atol=3e-6)
        np.testing.assert_allclose(sin[0, 0], np.sin(expected.numpy()) * scale, rtol=3e-6, atol=1e-12)
        if rope_type != "dynamic":
            ours, our_scale = rope_frequencies(rope, heads, context)
            np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
            assert our_scale == pytest.approx(scale, rel=1e-12)


def test_dynamic_scaling_is_the_default_within_the_context() -> None:
    dynamic = RopeConfig(rope_type="dynamic", factor=4.0)
    plain = dataclasses.replace(dynamic, rope_type="default")
    positions = jnp.arange(32, dtype=jnp.int32)[None, :]
    np.testing.assert_allclose(angles(dynamic, 8, 32, positions)[0], angles(plain, 8, 32, positions)[0], atol=3e-6)
    longer = jnp.arange(33, dtype=jnp.int32)[None, :]
    assert not np.allclose(angles(dynamic, 8, 32, longer)[0], angles(plain, 8, 32, longer)[0], atol=1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention(kv_heads: int) -> None:
    q, k, v = draw(2, 5, 6, 4), draw(2, kv_heads, 7, 4, seed=1), draw(2, kv_heads, 7, 4, seed=2)
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.5
    mask[0, 1], mask[:, 0, 0] = False, True
    actual = np.asarray(fast_jit(attend)(*map(jnp.asarray, (q, k, v, mask))))
    seen = mask.any(-1)
    np.testing.assert_allclose(actual[seen], oracles.attend(q, k, v, mask)[seen], atol=2e-6)
    assert np.isfinite(actual).all()


def test_masked_slots_change_nothing() -> None:
    q, k, v = draw(1, 3, 2, 4), draw(1, 2, 6, 4, seed=1), draw(1, 2, 6, 4, seed=2)
    mask = causal_mask(jnp.array([[1, 2, 3]], jnp.int32), 6)
    other_k, other_v = k.copy(), v.copy()
    other_k[:, :, 4:], other_v[:, :, 4:] = 1e4, -1e4
    run = fast_jit(attend)
    np.testing.assert_array_equal(run(q, k, v, mask), run(q, other_k, other_v, mask))


def test_causal_mask() -> None:
    mask = causal_mask(jnp.array([[0, 1, 2], [3, 3, 5]], jnp.int32), 5)
    for b, row in enumerate([[0, 1, 2], [3, 3, 5]]):
        for t, position in enumerate(row):
            assert np.asarray(mask)[b, t].tolist() == [slot <= position for slot in range(5)]


@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_window(window: int) -> None:
    """Tokens whose positions are not their slots, as in a tree."""
    positions, slots = [[4, 9, 9, 10]], [[0, 1, 4, 9, 9, 10]]
    actual = np.asarray(within_window(jnp.array(positions, jnp.int32), jnp.array(slots, jnp.int32), window))
    for t, position in enumerate(positions[0]):
        for s, other in enumerate(slots[0]):
            assert actual[0, t, s] == (position - other < (window or math.inf))
