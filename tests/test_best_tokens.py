"""Exchange between devices that share a vocabulary: the best of each shard, in place of all logits. `jax.vmap` with
names of axes stands for the devices; the whole vocabulary on one device is the reference."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from jax.sharding import AbstractMesh, PartitionSpec

from moespec_jax.decoding.accept import BestTokenAccept, accept_rule
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.nn.best_tokens import logits_or_best
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.top_k import most_probable, most_probable_of_shards
from moespec_jax.parallel.collectives import all_argmax
from moespec_jax.parallel.mesh import ShardingPlan

AXIS = ("tensor",)


def on_devices(function: Callable[..., Any], logits: np.ndarray, devices: int) -> Any:
    """Results of every device, each of which has its shard of the last dimension."""
    shards = jnp.asarray(logits.reshape(len(logits), devices, -1).swapaxes(0, 1))
    return jax.tree.map(np.asarray, fast_jit(jax.vmap(function, axis_name=AXIS[0]))(shards))


def of_few_values(rows: int, size: int, special: tuple[float, ...]) -> np.ndarray:
    """Logits with many equals, within shards and across."""
    rng = np.random.default_rng(size)
    return rng.choice(np.array([*special, -1.5, 0.0, 2.25], np.float32), size=(rows, size))


@pytest.mark.parametrize(("devices", "size"), [(8, 64), (4, 4), (2, 240)])
def test_the_best_token_of_shards_is_argmax(devices: int, size: int) -> None:
    """The lowest id among equals; NaN before all, as in `jnp.argmax`."""
    for special in ((), (np.inf, -np.inf), (np.nan, np.inf)):
        logits = of_few_values(60, size, special)
        logits[:3] = (special or (1.0,))[0]
        index, value = on_devices(partial(all_argmax, axes=AXIS), logits, devices)
        expected = np.asarray(jnp.argmax(jnp.asarray(logits), axis=-1))
        assert (index == expected).all()
        np.testing.assert_array_equal(value, np.broadcast_to(np.max(logits, axis=-1), value.shape))


@pytest.mark.parametrize(("devices", "size", "k"), [(8, 64, 1), (8, 64, 5), (8, 16, 6), (2, 320, 10)])
def test_the_most_probable_tokens_of_shards_are_those_of_the_whole(devices: int, size: int, k: int) -> None:
    """In the order of `jax.lax.top_k`, also of more tokens than a shard has and beside a shard of -inf."""
    logits = of_few_values(40, size, (-np.inf, 0.5))
    logits[:5, : 2 * size // devices] = -np.inf
    logits[:, -1] = 1.0
    logits[20:] += np.random.default_rng(0).normal(size=(20, size)).astype(np.float32)
    find = partial(most_probable_of_shards, most_probable, k=k, axes=AXIS)
    scores, ids = on_devices(lambda x: find(logits=x), logits, devices)
    expected = fast_jit(partial(most_probable, k=k))(jnp.asarray(logits))
    assert (ids == np.asarray(expected[1])).all()
    known = np.broadcast_to(np.asarray(expected[0]), scores.shape)
    np.testing.assert_allclose(scores, known, atol=1e-5)  # of float32, summed in another order


def test_without_shards_the_whole_is_searched_in_place() -> None:
    logits = jnp.asarray(of_few_values(3, 32, ()))
    seen = []
    most_probable_of_shards(lambda *given: seen.append(given) or most_probable(*given), logits, 4, ())
    assert len(seen) == 1 and seen[0][0] is logits and seen[0][1] == 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_devices_exchange_best_tokens_in_place_of_logits(tied: bool, bias: bool) -> None:
    shards, rows, vocab = 8, 60, 1024
    plan = ShardingPlan(vocabulary=("tensor",))

    def gathered(best_suffices: bool) -> int:
        def function(head: jax.Array, hidden: jax.Array) -> Any:
            whole = jnp.zeros((vocab, 16))
            added = jnp.zeros((vocab,)) if bias else None
            params = Decoder(
                whole, (), None, jnp.ones((16,)), None if tied else head, added, sharding=plan, logits_scaling=2.0
            )
            return logits_or_best(params, hidden, best_suffices=best_suffices)

        mesh, spec = AbstractMesh((shards,), ("tensor",)), PartitionSpec("tensor")
        run = jax.shard_map(function, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec(),
                            check_vma=False)  # fmt: skip
        return bytes_of("all_gather", jax.make_jaxpr(run)(jnp.zeros((vocab, 16)), jnp.zeros((rows, 16))).jaxpr)

    assert gathered(False) == rows * vocab * 4
    assert gathered(True) == rows * shards * (4 + 4)


def bytes_of(name: str, jaxpr: Any) -> int:
    """Bytes that all operations of this name return."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        total += sum(bytes_of(name, getattr(value, "jaxpr", value)) for value in inner)
        if equation.primitive.name.startswith(name):
            total += sum(out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)
    return total


@pytest.mark.parametrize(
    ("sampling", "suffices"),
    [
        (SamplingConfig(), True),
        (SamplingConfig(top_k=5, top_p=0.5, min_p=0.1), True),
        (SamplingConfig(temperature=1e-31), True),
        (SamplingConfig(temperature=0.5), False),
        (SamplingConfig(repetition_penalty=1.1), False),
        (SamplingConfig(presence_penalty=-0.5), False),
        (SamplingConfig(frequency_penalty=0.5), False),
        (SamplingConfig(logits_processor=lambda history, logits: logits), False),
    ],
)
def test_best_tokens_suffice_where_draws_read_nothing_else(sampling: SamplingConfig, suffices: bool) -> None:
    assert sampling.best_suffices == suffices
    assert isinstance(accept_rule(sampling, 3), BestTokenAccept) == suffices
    assert isinstance(accept_rule(sampling, 3, 2.0), BestTokenAccept), "simulated acceptance draws no token"
