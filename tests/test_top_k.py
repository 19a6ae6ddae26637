"""Top-k in two stages is `jax.lax.top_k`: values, indices, and the order of equals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moespec_jax.nn.top_k import PARTS, top_k, two_stages


@pytest.mark.parametrize(("n", "k"), [(PARTS, 1), (PARTS * 3, 3), (PARTS * 7 + 1, 7), (1000, 10)])
def test_two_stages_are_one(n: int, k: int) -> None:
    """Few different values, so that there are equals within a part and across parts; -inf is one of them."""
    rng = np.random.default_rng(n)
    both = jax.jit(lambda x: (two_stages(x, k=k), jax.lax.top_k(x, k)))
    for different in (0, 1, 2, 5, 50):
        levels = np.concatenate([[-np.inf], rng.normal(size=different)]).astype(np.float32)
        staged, whole = both(jnp.asarray(rng.choice(levels, size=(40, n))))
        for got, expected in zip(staged, whole, strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize(("n", "k"), [(100, 3), (4096, 65), (32000, 10)])
def test_only_gpus_take_two_stages_and_only_of_long_axes(n: int, k: int) -> None:
    traced = jax.jit(lambda x: top_k(x, k)).trace(jax.ShapeDtypeStruct((n,), jnp.float32))
    stages = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    count = {platform: text.count("chlo.top_k") for platform, text in stages.items()}
    assert count == {"cpu": 1, "cuda": 2 if n == 32000 else 1}
