"""The fused TPU kernel, interpreted, against plain float64 products of the experts each token chose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.pallas_tpu import WEIGHT_BUFFER_BYTES, ffn_tile, fused_experts, pallas_experts
from moespec_jax.nn.experts.slots import distinct_experts
from moespec_jax.nn.routing import Routing, combine_weights

EXPERTS, LAYERS, MODEL, FFN = 6, 2, 16, 48


def random_experts(ffn: int = FFN) -> Flat:
    rng = np.random.default_rng(0)
    shapes = [(LAYERS * EXPERTS, MODEL, ffn)] * 2 + [(LAYERS * EXPERTS, ffn, MODEL)]
    return Flat(*(jnp.asarray(0.3 * rng.standard_normal(s), jnp.float32) for s in shapes), num_experts=EXPERTS)


def poison_unused(experts: Flat, layer: int, used: set[int]) -> Flat:
    """NaN in every expert of every layer but the used ones of this layer."""
    rows = [layer * EXPERTS + e for e in used]
    keep = np.isin(np.arange(LAYERS * EXPERTS), rows)[:, None, None]
    return jax.tree.map(lambda w: jnp.where(keep, w, jnp.nan), experts)


def by_hand(experts: Flat, layer: int, x: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Token by token and expert by expert in float64; an id of `EXPERTS` means no expert."""
    gate, up, down = (np.asarray(w, np.float64) for w in (experts.gate, experts.up, experts.down))
    out = np.zeros(x.shape, np.float64)
    for t, row in enumerate(x.astype(np.float64)):
        for e, weight in zip(chosen[t], weights[t], strict=True):
            if e < EXPERTS:
                a = row @ gate[layer * EXPERTS + e]
                hidden = a / (1 + np.exp(-a)) * (row @ up[layer * EXPERTS + e])
                out[t] += weight * (hidden @ down[layer * EXPERTS + e])
    return out


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param([[4, 1]], id="one token"),
        pytest.param([[3, EXPERTS]], id="one token with an absent route"),
        pytest.param([[4, 1], [1, 4], [4, 1]], id="fewer experts than slots"),
        pytest.param([[0, 5], [2, 3], [EXPERTS, EXPERTS], [1, 4]], id="all experts and an idle token"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_matches_the_chosen_experts_and_reads_no_others(chosen: list[list[int]], layer: int) -> None:
    ids = np.asarray(chosen, np.int32)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((len(ids), MODEL)).astype(np.float32)
    weights = np.where(ids < EXPERTS, rng.uniform(0.1, 1.0, ids.shape), 0.0).astype(np.float32)
    experts = poison_unused(random_experts(), layer, set(ids[ids < EXPERTS].tolist()))
    got = jax.jit(pallas_experts("silu"))(experts, jnp.int32(layer), x, Routing(jnp.asarray(ids), jnp.asarray(weights)))
    np.testing.assert_allclose(np.asarray(got), by_hand(experts, layer, x, ids, weights), rtol=1e-5, atol=1e-5)


def test_no_experts_give_zero() -> None:
    routing = Routing(jnp.full((1, 2), EXPERTS, jnp.int32), jnp.zeros((1, 2)))
    experts = poison_unused(random_experts(), 1, set())
    got = jax.jit(pallas_experts("silu"))(experts, jnp.int32(1), jnp.ones((1, MODEL)), routing)
    assert not np.asarray(got).any()


def test_several_tiles_of_the_ffn_axis_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles, and slots past the active ones, which must add nothing although their weights are finite."""
    monkeypatch.setattr("moespec_jax.nn.experts.pallas_tpu.WEIGHT_BUFFER_BYTES", 6 * MODEL * 128 * 4)
    experts, rng = random_experts(ffn=384), np.random.default_rng(2)
    assert ffn_tile(MODEL, 384, 4) == 128
    x = rng.standard_normal((2, MODEL)).astype(np.float32)
    ids, weights = np.asarray([[5, 2], [2, 5]], np.int32), rng.uniform(size=(2, 2)).astype(np.float32)
    slots, active = distinct_experts(Routing(jnp.asarray(ids), jnp.asarray(weights)), EXPERTS)
    assert (len(slots), int(active)) == (4, 2)
    # A weight for every slot: only `active` may keep the unused ones out.
    combine = combine_weights(Routing(jnp.asarray(ids), jnp.asarray(weights)), slots).at[:, 2:].set(1.0)
    got = fused_experts(
        "silu", jnp.asarray(x), experts.gate, experts.up, experts.down, combine, EXPERTS + slots, active, interpret=True
    )
    np.testing.assert_allclose(np.asarray(got), by_hand(experts, 1, x, ids, weights), rtol=1e-5, atol=1e-5)


def test_tiles_divide_the_ffn_axis_and_fit_the_buffers() -> None:
    for model, ffn in [(2048, 1024), (2048, 768), (4096, 14336), (2048, 1408)]:
        tile = ffn_tile(model, ffn, 2)
        assert ffn % tile == 0 and tile % 128 == 0
        assert 6 * model * tile * 2 <= WEIGHT_BUFFER_BYTES
