"""The fused TPU attention, interpreted, against float64 sums over what each row sees; and where it is used."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from driver import build, cached_logits, fast_jit
from speculation import FastPrograms, decode, speculating
from test_decoder import CONFIG, TENSORS, TOLERANCE, ids_of
from test_speculate import PROMPTS, SMALL, pair, plain_tokens

from moespec_jax.decoding.tree import ancestors
from moespec_jax.nn import attention_tpu
from moespec_jax.nn.attention import Attention, attend_layer, project_qkv, tree_mask
from moespec_jax.nn.attention_tpu import attend_layer_tpu, fits, fused_attention, slot_tile
from moespec_jax.nn.backend import BACKENDS

LAYERS, BATCH, TOKENS, SLOTS, HEAD = 3, 2, 19, 384, 16
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
interpreted = partial(fused_attention, interpret=True)


@pytest.fixture(params=["one tile", "three tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tiles the cache is read in."""
    if request.param == "one tile":
        return 1
    monkeypatch.setattr(attention_tpu, "slot_tile", lambda q, k: SLOTS // 3)
    return 3


def random_inputs(heads: int = 4, groups: int = 2, dtype: Any = jnp.float32, seed: int = 0) -> Inputs:
    """Queries, the cache of all layers, and a mask of trees behind prefixes of different lengths, in which one row of
    the first sequence sees nothing and one of the second a single slot of the last tile."""
    rng = np.random.default_rng(seed)
    cache = (LAYERS, BATCH, groups, SLOTS, HEAD)
    q, k, v = (jnp.asarray(rng.normal(size=s), dtype) for s in ((BATCH, TOKENS, heads, HEAD), cache, cache))
    parents = np.array([[-1, *(rng.integers(0, i) for i in range(1, TOKENS))] for _ in range(BATCH)], np.int32)
    own = jax.vmap(ancestors)(jnp.asarray(parents))
    mask = np.array(tree_mask(own, jnp.array([5, SLOTS - TOKENS - 2], jnp.int32), SLOTS))
    mask[0, 3], mask[1, 4] = False, np.arange(SLOTS) == SLOTS - 7
    return q, k, v, jnp.asarray(mask)


def run(inputs: Inputs, layer: int, attention: Callable[..., jax.Array] = interpreted) -> np.ndarray:
    q, k, v, mask = inputs
    # A function of its own: one that was traced before would keep its number of tiles.
    traced = fast_jit(lambda *arguments: attention(*arguments))
    return np.asarray(traced(q, k, v, jnp.int32(layer), mask).astype(jnp.float32))


def oracle(inputs: Inputs, layer: int) -> np.ndarray:
    q, k, v, mask = (np.asarray(a.astype(jnp.float32)) for a in inputs)
    return oracles.attend(q, k[layer], v[layer], mask > 0)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (8, 1), (16, 2)])
def test_rows_mix_what_they_see(heads: int, groups: int, layer: int, tiles: int) -> None:
    inputs = random_inputs(heads, groups, seed=layer)
    actual, seen = run(inputs, layer), np.asarray(inputs[3]).any(-1)
    np.testing.assert_allclose(actual[seen], oracle(inputs, layer)[seen], atol=2e-6)  # sums of values around 1
    assert not seen.all()
    # A row that sees nothing averages over all slots, as in `attend`.
    np.testing.assert_allclose(actual, run(inputs, layer, attend_layer), atol=2e-6)


def test_bfloat16(tiles: int) -> None:
    inputs = random_inputs(8, 2, jnp.bfloat16)
    seen = np.asarray(inputs[3]).any(-1)
    actual, expected = run(inputs, 1)[seen], oracle(inputs, 1)[seen]
    # Weights and result are rounded to 8 bits, 2^-9 of values up to 4 each.
    np.testing.assert_allclose(actual, expected, atol=2**-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unseen_slots_and_other_layers_change_no_bit(dtype: Any, tiles: int) -> None:
    """Free slots may hold any finite number, other layers not even that."""
    q, k, v, mask = random_inputs(dtype=dtype)
    mask = mask.at[0, 3, 2].set(True)  # who sees nothing averages over everything
    clean, seen = run((q, k, v, mask), 1), jnp.any(mask, axis=1)[None, :, None, :, None]
    huge = float(jnp.finfo(dtype).max)
    for garbage in (huge, -huge):
        other = [jnp.where(seen, store, garbage).at[jnp.array([0, 2])].set(jnp.nan) for store in (k, v)]
        np.testing.assert_array_equal(run((q, *other, mask), 1), clean)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_speculation_with_it_is_plain_decoding(family: str) -> None:
    """Whole rounds, three sequences; the second family has windows."""
    config, params, backend, draft, head = pair(family, "slots")
    method = speculating(config, params, backend._replace(attention=interpreted), draft, head, SMALL)
    run = decode(method, FastPrograms(), PROMPTS, 60)
    assert run.sequences == plain_tokens(family, "slots", 60)
    assert run.accepted.sum() > 3


@pytest.mark.slow
def test_a_pass_with_it_equals_one_without() -> None:
    params, ids = build(CONFIG, TENSORS, BACKENDS["slots"]), ids_of(2, 12)
    one, other = (
        cached_logits(CONFIG, params, BACKENDS["slots"]._replace(attention=attention), ids)
        for attention in (interpreted, attend_layer)
    )
    np.testing.assert_allclose(one, other, atol=TOLERANCE)


@pytest.mark.slow
def test_the_back_end_for_tpus_decodes_elsewhere_too() -> None:
    run = decode(speculating(*pair(backend="pallas"), SMALL), FastPrograms(), PROMPTS, 30)
    assert run.sequences == plain_tokens("qwen3_moe", "slots", 30)


def abstract(tokens: int = 60, head: int = 128, slots: int = 2048, heads: int = 32, groups: int = 4) -> Inputs:
    """Inputs without memory behind them, of Qwen3-30B-A3B's shape by default."""
    cache = jax.ShapeDtypeStruct((48, 1, groups, slots, head), jnp.dtype(jnp.bfloat16))
    q = jax.ShapeDtypeStruct((1, tokens, heads, head), jnp.dtype(jnp.bfloat16))
    return q, cache, cache, jax.ShapeDtypeStruct((1, tokens, slots), jnp.dtype(bool))  # pyright: ignore[reportReturnType]


def lowered(platform: str, function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_only_programs_for_tpus_hold_the_kernel(platform: str) -> None:
    q, k, v, mask = abstract()
    for attention, kernels in ((attend_layer_tpu, platform == "tpu"), (BACKENDS["slots"].attention, False)):
        text = lowered(platform, attention, q, k, v, jax.ShapeDtypeStruct((), jnp.dtype(jnp.int32)), mask)
        assert ("tpu_custom_call" in text) == kernels


@pytest.mark.parametrize("shape", [dict(tokens=1), dict(tokens=65), dict(head=64), dict(slots=3 * 4099)], ids=str)
def test_what_does_not_fit_runs_as_before(shape: dict[str, int]) -> None:
    q, k, v, mask = abstract(**shape)
    assert not fits(q, k)
    layer = jax.ShapeDtypeStruct((), jnp.dtype(jnp.int32))
    assert "tpu_custom_call" not in lowered("tpu", attend_layer_tpu, q, k, v, layer, mask)


@pytest.mark.parametrize(("heads", "groups"), [(16, 16), (32, 4), (32, 8)])  # OLMoE, Qwen3-30B-A3B, Mixtral
def test_published_shapes_take_2048_slots_at_once_and_longer_caches_in_equal_tiles(heads: int, groups: int) -> None:
    assert slot_tile(*abstract(heads=heads, groups=groups)[:2]) == 2048
    for slots in (4096, 5 * 1024, 32768, 262144):
        q, k, *_ = abstract(slots=slots, heads=heads, groups=groups)
        tile = slot_tile(q, k)
        assert fits(q, k) and tile is not None and slots % tile == tile % 128 == 0 and tile >= 1024


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_projections_are_held_apart_from_their_heads_on_tpus_alone(platform: str) -> None:
    weights = Attention(*(jnp.zeros((heads * CONFIG.head_dim, CONFIG.hidden_size)) for heads in (4, 2, 2, 4)))
    x, angles = jnp.zeros((1, 3, CONFIG.hidden_size)), jnp.zeros((1, 3, CONFIG.head_dim // 2))
    text = lowered(platform, partial(project_qkv, CONFIG), weights, x, angles, angles)
    assert text.count("optimization_barrier") == (3 if platform == "tpu" else 0)
