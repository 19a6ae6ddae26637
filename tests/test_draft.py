"""The draft head against one in NumPy, in every variant, and far beyond the context it was trained on."""

from typing import Any

import head_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from head_oracle import VARIANTS, VOCAB, beside, head_of

from moespec_jax.config import DraftConfig
from moespec_jax.decoding.eagle3_drafter import extend_cache
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.eagle3 import DraftHead, draft_forward, draft_logits, fuse_aux, next_features

PAIRS = 24  # more than `max_position_embeddings`
TOLERANCE = 1e-5  # float32 against float64, on values of about 1


def inputs(config: DraftConfig, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Auxiliary hidden states of one sequence, and the token after each."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(PAIRS, config.aux_size)).astype(np.float32), rng.integers(0, VOCAB, PAIRS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_equals_the_reference(variant: str) -> None:
    """Pairs of a true prefix, then two draft steps on the head's own outputs."""
    config, head, embedding = head_of(variant)
    aux, following = inputs(config)
    embed = embedding if head.embed is None else head.embed
    prefix = PAIRS - 2

    @fast_jit
    def run(head: DraftHead) -> Any:
        tokens = jnp.asarray(following, jnp.int32)[None, :]
        cache = empty_cache(config, 1, PAIRS + 3, jnp.float32, stacked=False)
        states, params = jnp.asarray(aux)[None, :prefix], beside(head, embedding)
        out, cache = extend_cache(config, params, states, tokens[:, :prefix], cache)
        outs = [out]
        for t in (prefix, prefix + 1):
            cache = cache.replace(length=jnp.full((1,), t, jnp.int32))
            positions = jnp.full((1, 1), t, jnp.int32)
            features, mask = next_features(config, head, outs[-1][:, -1:]), causal_mask(positions, cache.slots)
            out, cache = draft_forward(config, head, embed[tokens[:, t : t + 1]], features, positions, mask, cache)
            outs.append(out)
        whole = jnp.concatenate(outs, axis=1)
        return whole[0], draft_logits(config, head, whole)[0], next_features(config, head, whole)[0]

    embedded = np.asarray(embed)[following]
    features = oracle.fuse(config, head, aux[:prefix].astype(np.float64))
    for t in (prefix, prefix + 1):
        out = oracle.outputs(config, head, features, embedded[:t])
        features = np.concatenate([features, oracle.handed_on(config, head, out[-1:])])
    out = oracle.outputs(config, head, features, embedded)
    expected = (out, oracle.logits(config, head, out), oracle.handed_on(config, head, out))
    assert 0.2 < out.std() < 5 and 0.2 < expected[1].std() < 5
    for ours, theirs in zip(run(head), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_fused_features_equal_the_reference() -> None:
    for variant in ("base", "norm_before_fc", "fc_norm", "biases", "own_embedding"):
        config, head, _ = head_of(variant)
        aux, _ = inputs(config)
        expected = oracle.fuse(config, head, aux.astype(np.float64))
        np.testing.assert_allclose(fuse_aux(config, head, jnp.asarray(aux)[None])[0], expected, atol=TOLERANCE)


def test_every_variant_changes_the_numbers() -> None:
    """So that none of them passes above for having no effect."""
    aux, following = inputs(head_of("base")[0])
    seen = []
    for variant in VARIANTS:
        config, head, embedding = head_of(variant)
        if variant == "full_vocabulary" or config.own_embedding:
            continue
        first = oracle.outputs(config, head, oracle.fuse(config, head, aux), np.asarray(embedding)[following])
        seen.append(oracle.handed_on(config, head, first))
    for i, one in enumerate(seen):
        assert all(np.abs(one - other).max() > 1e-2 for other in seen[:i])


# Angles are float32: at position p they are off by up to p * 2**-24, here 6e-5 and 6e-3.
@pytest.mark.parametrize(("start", "tolerance"), [(10, 1e-5), (1_000, 1e-3), (100_000, 3e-2)])
def test_positions_beyond_the_trained_context(start: int, tolerance: float) -> None:
    """Rotary attention knows differences of positions only: a shifted sequence gives the same outputs, be it across the
    end of the trained context or far behind it."""
    config, head, embedding = head_of("base")
    aux, following = inputs(config)
    features = fuse_aux(config, head, jnp.asarray(aux)[None])

    def run(positions: jax.Array) -> jax.Array:
        mask = causal_mask(jnp.arange(PAIRS, dtype=jnp.int32)[None, :], PAIRS)
        cache = empty_cache(config, 1, PAIRS, jnp.float32, stacked=False)
        return draft_forward(config, head, embedding[following][None], features, positions, mask, cache)[0]

    run = fast_jit(run)
    at = jnp.arange(PAIRS, dtype=jnp.int32)[None, :]
    shifted = run(at + start)
    assert config.max_position_embeddings < start + PAIRS and np.isfinite(shifted).all()
    np.testing.assert_allclose(shifted, run(at), atol=tolerance)
