"""Small random experts in the `Flat` layout, who goes to them, and the loop that GPU kernels are held against."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from moespec_jax.config import Activation
from moespec_jax.nn.experts.gpu import SlotOutputs, sum_distinct, sum_grouped
from moespec_jax.nn.experts.layouts import Flat, PerExpert
from moespec_jax.nn.experts.slots import SLOT_TOKENS
from moespec_jax.nn.layers import GatedMlp
from moespec_jax.nn.routing import Routing

EXPERTS, LAYERS, MODEL, FFN = 6, 2, 128, 64
LAYER = 1  # not the first, so that an offset counted wrongly is seen
REAL = {
    "OLMoE-1B-7B": (64, 2048, 1024, 8),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "Mixtral-8x7B": (8, 4096, 14336, 2),
}


def random_experts(dtype: Any = jnp.bfloat16, model: int = MODEL, ffn: int = FFN) -> Flat:
    rng = np.random.default_rng(0)
    shapes = [(LAYERS * EXPERTS, model, ffn)] * 2 + [(LAYERS * EXPERTS, ffn, model)]
    return Flat(*(jnp.asarray(rng.normal(size=s) * s[1] ** -0.5, dtype) for s in shapes), num_experts=EXPERTS)


def flat_from_per_expert(experts: PerExpert) -> Flat:
    """Stack the weights of a `PerExpert` layout."""
    rows = [expert for layer in experts for expert in layer]
    names = [name for name in GatedMlp.__dataclass_fields__ if getattr(rows[0], name) is not None]
    stack = {name: jnp.stack([getattr(row, name) for row in rows]) for name in names}
    return Flat(**stack, num_experts=len(experts[0]))


def poison_unused(experts: Flat, used: set[int]) -> Flat:
    """NaN in every expert of every layer but the used ones of `LAYER`."""
    keep = np.isin(np.arange(LAYERS * EXPERTS), [LAYER * EXPERTS + e for e in used])[:, None, None]
    return jax.tree.map(lambda w: jnp.where(keep, w, jnp.asarray(jnp.nan, w.dtype)), experts)


def random_input(experts: Flat, chosen: Any) -> tuple[jax.Array, Routing]:
    """A row for every token of `chosen`, in which `EXPERTS` means no expert, and random weights."""
    ids, rng = np.asarray(chosen, np.int32), np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(len(ids), experts.gate.shape[1])), experts.gate.dtype)
    weights = np.where(ids < EXPERTS, rng.uniform(0.1, 1.0, ids.shape), 0.0)
    return x, Routing(jnp.asarray(ids), jnp.asarray(weights, jnp.float32))


def some_choice(tokens: int) -> np.ndarray:
    chosen = np.argsort(np.random.default_rng(tokens).random((tokens, EXPERTS)), axis=1)[:, :2]
    return np.where(np.arange(tokens)[:, None] == 2, EXPERTS, chosen)


def check(got: jax.Array, experts: Flat, x: jax.Array, routing: Routing, activation: str = "silu") -> None:
    first = LAYER * EXPERTS
    gate, up, down = (
        np.asarray(w, np.float64)[first : first + EXPERTS] for w in (experts.gate, experts.up, experts.down)
    )
    expected = oracles.experts(
        np.asarray(x),
        list(zip(gate, up, down, strict=True)),
        np.asarray(routing.experts),
        np.asarray(routing.weights),
        activation,
    )
    assert got.dtype == jnp.float32
    # To 8 bits in bfloat16 are rounded the hidden rows, and, of several tokens, the sums, by half a bit of the largest.
    rounding = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2e-6}[x.dtype.name]
    rounding *= 1.5 if len(x) > 1 else 1.0
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=rounding * max(np.abs(expected).max(), 1.0))


def by_slots(activation: Activation, outputs: SlotOutputs) -> Callable[[Flat, jax.Array, Routing], jax.Array]:
    """Experts of `LAYER` by an interpreted kernel, over slots of distinct experts or of blocks of rows."""

    def compute(experts: Flat, x: jax.Array, routing: Routing) -> jax.Array:
        def run(rows: jax.Array, ids: jax.Array) -> jax.Array:
            return outputs(activation, rows, experts, jnp.int32(LAYER * EXPERTS), ids)

        if x.shape[0] > SLOT_TOKENS:
            return sum_grouped(x, routing, EXPERTS, run)
        return sum_distinct(x, routing, EXPERTS, run, interpret=True)

    return compute


def shapes(experts: int, model: int, ffn: int, active: int, tokens: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """The arguments of an expert compute by shape only."""
    s, rows = jax.ShapeDtypeStruct, LAYERS * experts
    flat = Flat(
        s((rows, model, ffn), dtype), s((rows, model, ffn), dtype), s((rows, ffn, model), dtype), num_experts=experts
    )
    routing = Routing(s((tokens, active), jnp.int32), s((tokens, active), jnp.float32))
    return flat, s((), jnp.int32), s((tokens, model), dtype), routing
