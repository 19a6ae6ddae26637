"""Every expert compute against a loop over tokens and experts, on routings that pick out each corner."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from driver import fast_jit
from flat_experts import flat_from_per_expert

from moespec_jax.nn.experts.blocks import lay_out_routes
from moespec_jax.nn.experts.capacity import ExpertStack, capacity_experts
from moespec_jax.nn.experts.cpu import DECODE_BLOCKS, PREFILL_BLOCKS, PREFILL_TOKENS, cpu_experts
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.nn.experts.layouts import Flat, PerExpert
from moespec_jax.nn.experts.slots import PARTS, SLOT_TOKENS, slot_experts
from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.routing import Routing

EXPERTS, ACTIVE, MODEL, FFN, LAYERS = 6, 3, 10, 7, 2
LAYER = 1  # not the first, so that an offset counted wrongly is seen
COUNTS = (1, 2, 17, 130, 200)


def test_counts_reach_every_path() -> None:
    assert 1 < 2 < 17 < PREFILL_TOKENS <= 130 and 17 <= SLOT_TOKENS < 130
    # 17 tokens on one expert need more than one block; "every block size" is made for 200 tokens.
    assert 17 > DECODE_BLOCKS[-1] and len(PREFILL_BLOCKS) == EXPERTS and 200 >= PREFILL_BLOCKS[0] + PREFILL_BLOCKS[3]


def random_experts(seed: int = 0) -> PerExpert:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(rows, columns)) * rows**-0.5, jnp.float32)

    def expert() -> GatedMlp:
        return GatedMlp(matrix(MODEL, FFN), matrix(MODEL, FFN), matrix(FFN, MODEL))

    return tuple(tuple(expert() for _ in range(EXPERTS)) for _ in range(LAYERS))


def stacks(experts: PerExpert) -> tuple[ExpertStack, ...]:
    return tuple(
        ExpertStack(*(jnp.stack([getattr(e, n) for e in layer]) for n in ("gate", "up", "down"))) for layer in experts
    )


def routings(tokens: int) -> dict[str, Routing]:
    """Distinct experts per token; no expert has weight 0, as `route` gives it."""
    rng = np.random.default_rng(tokens)
    chosen = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :ACTIVE]
    weights = rng.random((tokens, ACTIVE))
    cases = {"random": (chosen, weights)}
    cases["few experts"] = (np.where(chosen < 4, chosen, EXPERTS), weights)
    cases["some idle tokens"] = (np.where(rng.random((tokens, 1)) < 0.5, EXPERTS, chosen), weights)
    cases["all tokens idle"] = (np.full_like(chosen, EXPERTS), weights)
    one = np.full_like(chosen, EXPERTS)
    one[:, 1] = 2
    cases["all to one expert"] = (one, weights)
    if tokens == 200:
        sizes = np.full_like(chosen, EXPERTS)
        for expert, size in enumerate(PREFILL_BLOCKS):
            first = PREFILL_BLOCKS[0] if expert >= ACTIVE else 0
            sizes[first : first + size, expert % ACTIVE] = expert
        cases["every block size"] = (sizes, weights)
    cases["all to the same experts"] = (np.broadcast_to([5, 0, 3], chosen.shape), weights)
    return {
        name: Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(np.where(ids < EXPERTS, w, 0.0), jnp.float32))
        for name, (ids, w) in cases.items()
    }


def rows(tokens: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(99).normal(size=(tokens, MODEL)), jnp.float32)


def same(experts: PerExpert) -> PerExpert:
    return experts


# Capacity for every route of every token: nothing is dropped.
FORMS: dict[str, tuple[Callable[[str], ExpertCompute], Callable[[PerExpert], Any]]] = {
    "switch": (cpu_experts, same),
    "slots": (slot_experts, flat_from_per_expert),
    "dense": (dense_experts, flat_from_per_expert),
    "capacity": (lambda activation: capacity_experts(float(EXPERTS), activation), stacks),
}


def compiled(form: str, activation: str = "silu") -> Callable[..., jax.Array]:
    compute = FORMS[form][0](activation)
    return fast_jit(lambda experts, x, routing: compute(experts, LAYER, x, routing))


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_loop(form: str, tokens: int) -> None:
    experts, x, run = random_experts(), rows(tokens), compiled(form)
    held = FORMS[form][1](experts)
    matrices = [tuple(np.asarray(m) for m in (e.gate, e.up, e.down)) for e in experts[LAYER]]
    for name, routing in routings(tokens).items():
        expected = oracles.experts(
            np.asarray(x), matrices, np.asarray(routing.experts), np.asarray(routing.weights), "silu"
        )
        np.testing.assert_allclose(np.asarray(run(held, x, routing)), expected, atol=2e-6, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("form", FORMS)
def test_activations(form: str, activation: str) -> None:
    experts, x, routing = random_experts(), rows(5), routings(5)["random"]
    matrices = [tuple(np.asarray(m) for m in (e.gate, e.up, e.down)) for e in experts[LAYER]]
    expected = oracles.experts(
        np.asarray(x), matrices, np.asarray(routing.experts), np.asarray(routing.weights), activation
    )
    actual = compiled(form, activation)(FORMS[form][1](experts), x, routing)
    np.testing.assert_allclose(np.asarray(actual), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("form", ["switch", "slots"])
def test_weights_of_unselected_experts_are_never_used(form: str, tokens: int) -> None:
    """NaN in them changes no bit of the output."""
    experts, x, run = random_experts(), rows(tokens), compiled(form)
    for name, routing in routings(tokens).items():
        selected = set(np.asarray(routing.experts).ravel().tolist())
        poisoned = tuple(
            tuple(
                expert if layer == LAYER and number in selected else jax.tree.map(lambda a: a * jnp.nan, expert)
                for number, expert in enumerate(row)
            )
            for layer, row in enumerate(experts)
        )
        clean, other = (np.asarray(run(FORMS[form][1](e), x, routing)) for e in (experts, poisoned))
        np.testing.assert_array_equal(clean, other, err_msg=name)


@pytest.mark.parametrize("tokens", [1, 17, 130])
@pytest.mark.parametrize("form", ["switch", "slots", "dense"])
def test_bfloat16(form: str, tokens: int) -> None:
    def narrow(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)

    experts, x, routing = narrow(random_experts()), narrow(rows(tokens)), routings(tokens)["some idle tokens"]
    matrices = [tuple(np.asarray(m) for m in (e.gate, e.up, e.down)) for e in experts[LAYER]]
    expected = oracles.experts(
        np.asarray(x), matrices, np.asarray(routing.experts), np.asarray(routing.weights), "silu"
    )
    actual = compiled(form)(FORMS[form][1](experts), x, routing)
    assert actual.dtype == jnp.float32
    # bfloat16 keeps 8 bits; gate, up and result are each rounded once.
    np.testing.assert_allclose(np.asarray(actual), expected, atol=3 * 2**-8 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("model", "ffn"), [pytest.param(3 * PARTS, 2 * PARTS, id="whole"), pytest.param(PARTS, PARTS + 1, id="not whole")]
)
def test_one_token_in_parts_as_on_gpus(monkeypatch: pytest.MonkeyPatch, model: int, ffn: int, dtype: Any) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cuda, default: cuda(*arguments))
    rng, rows = np.random.default_rng(model), LAYERS * EXPERTS
    gate, up, down = (
        jnp.asarray(rng.normal(size=shape) * shape[1] ** -0.5, dtype)
        for shape in [(rows, model, ffn), (rows, model, ffn), (rows, ffn, model)]
    )
    x, routing = jnp.asarray(rng.normal(size=(1, model)), dtype), routings(1)["random"]
    actual = compiled("slots")(Flat(gate, up, down, num_experts=EXPERTS), x, routing)
    matrices = [tuple(np.asarray(w[LAYER * EXPERTS + e], np.float64) for w in (gate, up, down)) for e in range(EXPERTS)]
    ids, weights = np.asarray(routing.experts), np.asarray(routing.weights)
    expected = oracles.experts(np.asarray(x, np.float64), matrices, ids, weights, "silu")
    # The hidden row is rounded once, to 8 bits in bfloat16; sums are in float32.
    rounding = {"bfloat16": 2**-8, "float32": 2e-6}[x.dtype.name]
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=rounding * max(np.abs(expected).max(), 1.0))


def test_only_one_token_on_a_gpu_is_summed_in_parts() -> None:
    def parts(tokens: int, platform: str) -> int:
        experts = Flat(*[jax.ShapeDtypeStruct((LAYERS * EXPERTS, 32, 32), jnp.bfloat16)] * 3, num_experts=EXPERTS)
        x, routing = jax.ShapeDtypeStruct((tokens, 32), jnp.bfloat16), routings(tokens)["random"]
        traced = jax.jit(slot_experts("silu")).trace(experts, jnp.int32(0), x, routing)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier")

    assert parts(1, "cuda") == 3
    assert [parts(*other) for other in [(1, "cpu"), (1, "tpu"), (1, "rocm"), (2, "cuda")]] == [0, 0, 0, 0]


def test_a_capacity_of_one_keeps_the_earliest_token() -> None:
    experts, x = random_experts(), rows(4)
    routing = Routing(jnp.array([[2], [2], [3], [2]], jnp.int32), jnp.ones((4, 1), jnp.float32))
    compute = capacity_experts(EXPERTS / 4)
    out = np.asarray(compute(stacks(experts), LAYER, x, routing))
    matrices = [tuple(np.asarray(m) for m in (e.gate, e.up, e.down)) for e in experts[LAYER]]
    for token, expert in ((0, 2), (2, 3)):
        np.testing.assert_allclose(
            out[token], oracles.gated_mlp(np.asarray(x)[token], *matrices[expert], "silu"), atol=2e-6
        )
    assert not out[[1, 3]].any()


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("unit", [1, 16])
def test_routes_lie_in_whole_blocks_of_their_expert(unit: int, tokens: int) -> None:
    """Every route has a row of its own among its expert's; every row holds its route's token, or the zero row."""
    lay_out = fast_jit(lambda routing: lay_out_routes(routing, EXPERTS, unit))
    for routing in routings(tokens).values():
        laid = jax.tree.map(np.asarray, lay_out(routing))
        seen: set[int] = set()
        for route, expert in enumerate(np.asarray(routing.experts).ravel().tolist()):
            if expert < EXPERTS:
                row = int(laid.row[route])
                assert laid.begin[expert] <= row < laid.begin[expert] + laid.length[expert]
                assert laid.token[row] == route // ACTIVE and row not in seen
                seen.add(row)
        counts = np.bincount(np.asarray(routing.experts).ravel(), minlength=EXPERTS)[:EXPERTS]
        np.testing.assert_array_equal(laid.length, -(-counts // unit) * unit)
        used = [row for e in range(EXPERTS) for row in range(laid.begin[e], laid.begin[e] + laid.length[e])]
        assert all(laid.token[row] == tokens for row in set(used) - seen)
