"""The Triton kernels: interpreted against float64 products, lowered for CUDA at real shapes, and who replaces them."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from driver import fast_jit
from flat_experts import (
    EXPERTS,
    FFN,
    LAYER,
    MODEL,
    REAL,
    by_slots,
    check,
    poison_unused,
    random_experts,
    random_input,
    shapes,
    some_choice,
)

from moespec_jax.config import Activation, ClampedSwiglu
from moespec_jax.nn.experts.distinct_gpu import list_distinct
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.slots import SLOT_TOKENS
from moespec_jax.nn.experts.triton_gpu import KERNEL_ACTIVATIONS, TILE, slot_outputs, supported, triton_experts
from moespec_jax.nn.quantization import BLOCK, FORMS, Matrix, Mxfp4, Quantization, Quantized
from moespec_jax.nn.routing import Routing

# Said at lowering, from jax 0.11 on; the module says why it is used all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def quantized(experts: Flat, form: Quantization) -> Flat:
    def one(matrix: jax.Array) -> Matrix:
        parts = zip(*(FORMS[form].quantize(np.asarray(m, np.float32).T) for m in matrix), strict=True)
        return FORMS[form].kind(*(jnp.asarray(np.stack(part).swapaxes(1, 2)) for part in parts))

    return jax.tree.map(one, experts)


def is_quantized(leaf: object) -> bool:
    return isinstance(leaf, Quantized | Mxfp4)


def dequantized(leaf: Matrix) -> np.ndarray:
    """In float32, of MXFP4 by a table of the codes' numbers."""
    if isinstance(leaf, Mxfp4):
        *stack, blocks, out = leaf.exponents.shape
        codes = np.asarray(leaf.codes).reshape(*stack, blocks, BLOCK // 2, out)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        numbers = np.concatenate([np.append(table, -table)[half] for half in (codes & 15, codes >> 4)], axis=-2)
        scaled = np.ldexp(numbers, np.asarray(leaf.exponents, np.int32)[..., None, :] - 127)
        return scaled.reshape(*stack, -1, out)
    return (
        np.asarray(leaf.values, np.float32) * np.asarray(leaf.scale)
        if isinstance(leaf, Quantized)
        else np.asarray(leaf)
    )


def interpret(activation: Activation, experts: Flat, x: jax.Array, routing: Routing) -> jax.Array:
    """The kernels block by block on the CPU; what was not written reads as NaN."""
    return fast_jit(by_slots(activation, partial(slot_outputs, interpret=True)))(experts, x, routing)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param([[4, 1]], id="one token"),
        pytest.param([[EXPERTS - 1, EXPERTS]], id="one token with an absent route"),
        pytest.param([[4, 1], [1, 4], [4, 1]], id="fewer experts than slots"),
        pytest.param([[0, 5], [2, 3], [EXPERTS, EXPERTS], [1, 4]], id="all experts and an idle token"),
        pytest.param([[EXPERTS, EXPERTS]], id="no experts"),
    ],
)
def test_matches_the_chosen_experts_and_reads_no_others(chosen: list[list[int]]) -> None:
    ids = np.asarray(chosen)
    experts = poison_unused(random_experts(), set(ids[ids < EXPERTS].tolist()))
    x, routing = random_input(experts, chosen)
    check(interpret("silu", experts, x, routing), jax.tree.map(jnp.nan_to_num, experts), x, routing)


@pytest.mark.parametrize("activation", [name for name in oracles.ACTIVATIONS if name in KERNEL_ACTIVATIONS])
def test_activations_interpreted(activation: str) -> None:
    experts = random_experts(jnp.float16)
    x, routing = random_input(experts, [[2, 0]])
    check(interpret(activation, experts, x, routing), experts, x, routing, activation)


@pytest.mark.parametrize("tokens", [1, 5, 16, SLOT_TOKENS + 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", FORMS)
def test_quantized_experts_are_those_that_they_approximate(form: Quantization, dtype: Any, tokens: int) -> None:
    experts = random_experts(dtype, model=2 * TILE, ffn=3 * TILE)
    x, routing = random_input(experts, some_choice(tokens))
    rounded = quantized(experts, form)
    check(interpret("silu", rounded, x, routing), jax.tree.map(dequantized, rounded, is_leaf=is_quantized), x, routing)


@pytest.mark.parametrize("stored", [None, *FORMS])
@pytest.mark.parametrize("tokens", [1, 5, SLOT_TOKENS + 1])
def test_biases_and_clamped_swiglu_as_in_gpt_oss(tokens: int, stored: Quantization | None) -> None:
    """Inputs large enough that both clamps act."""
    experts = random_experts(model=2 * TILE, ffn=TILE)
    random = np.random.default_rng(5)
    biases = {
        f"{name}_bias": jnp.asarray(random.normal(size=(len(matrix), 1, matrix.shape[2])), jnp.bfloat16)
        for name, matrix in (("gate", experts.gate), ("up", experts.up), ("down", experts.down))
    }
    x, routing = random_input(experts, some_choice(tokens))
    x, form = x * jnp.asarray(4, x.dtype), ClampedSwiglu()
    experts = (experts if stored is None else quantized(experts, stored)).replace(**biases)
    got = np.asarray(interpret(form, experts, x, routing))
    whole = jax.tree.map(lambda leaf: np.asarray(dequantized(leaf), np.float64), experts, is_leaf=is_quantized)
    expected, clamped = np.zeros(x.shape), 0
    for token, (ids, weights) in enumerate(zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert == EXPERTS:
                continue
            at, row = LAYER * EXPERTS + expert, np.asarray(x[token], np.float64)
            gate, up = row @ whole.gate[at] + whole.gate_bias[at, 0], row @ whole.up[at] + whole.up_bias[at, 0]
            clamped += (gate > 7).sum() * (np.abs(up) > 7).sum()
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            expected[token] += weight * (hidden @ whole.down[at] + whole.down_bias[at, 0])
    assert clamped > 0
    # Hidden values are rounded to 8 bits, and, of several tokens, the sums.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2**-7 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [16, 17, SLOT_TOKENS, SLOT_TOKENS + 1, 200])
def test_several_steps_and_columns_with_rows_to_spare_or_none(tokens: int) -> None:
    experts = random_experts(model=3 * TILE, ffn=2 * TILE)
    x, routing = random_input(experts, some_choice(tokens))
    check(interpret("silu", experts, x, routing), experts, x, routing)


def test_slots_are_no_more_than_the_routing_allows() -> None:
    experts = random_experts()
    x, routing = random_input(experts, [[4, 1], [1, 4], [4, 1]])
    routing = routing.replace(max_distinct=3)
    assert len(list_distinct(routing, EXPERTS, interpret=True)[0]) == 3
    check(interpret("silu", experts, x, routing), experts, x, routing)


@pytest.mark.parametrize("others", [1, SLOT_TOKENS])
def test_an_infinite_expert_leaves_other_tokens_alone(others: int) -> None:
    experts = random_experts()
    experts = experts.replace(down=experts.down.at[LAYER * EXPERTS + 4].set(jnp.inf))
    x, routing = random_input(experts, [[4, 1], *[[1, 2]] * others])
    got = np.asarray(interpret("silu", experts, x, routing))
    assert not np.isfinite(got[0]).any() and np.isfinite(got[1]).all()


def test_many_tokens_read_no_expert_that_none_uses() -> None:
    """Nor does a token without experts: all of its output is 0."""
    chosen = np.tile([[4, 1], [1, EXPERTS], [EXPERTS, EXPERTS]], (30, 1))
    experts = poison_unused(random_experts(), {1, 4})
    x, routing = random_input(experts, chosen)
    got = interpret("silu", experts, x, routing)
    check(got, jax.tree.map(jnp.nan_to_num, experts), x, routing)
    assert not np.asarray(got)[2::3].any()


def lowered(activation: Activation, arguments: tuple[Any, ...]) -> str:
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(triton_experts(activation)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("model", REAL)
def test_lowers_at_real_shapes_and_nothing_but_the_kernels_touches_weights(model: str) -> None:
    experts, width, ffn, active = REAL[model]
    text = lowered("silu", shapes(experts, width, ffn, active, tokens=60))
    matrix = re.compile(rf"tensor<(\d+x)*({width}x{ffn}|{ffn}x{width})xbf16>")
    touching = [line.strip() for line in text.splitlines() if matrix.search(line)]
    calls = [line for line in touching if "xla.gpu.triton" in line]
    assert len(calls) == 2 and not any(matrix.search(line.rsplit("->", 1)[1]) for line in calls)
    assert [line[:9] for line in touching if line not in calls] == ["func.func"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, SLOT_TOKENS, 2 * SLOT_TOKENS])
def test_every_activation_and_dtype_lowers(activation: str, dtype: Any, tokens: int) -> None:
    assert "xla.gpu.triton" in lowered(activation, shapes(EXPERTS, MODEL, FFN, 2, tokens, dtype))


@pytest.mark.parametrize("tokens", [1, SLOT_TOKENS, 2 * SLOT_TOKENS])
@pytest.mark.parametrize("form", FORMS)
def test_quantized_experts_with_biases_lower(form: Quantization, tokens: int) -> None:
    experts, *others = shapes(EXPERTS, MODEL, FFN, 2, tokens)

    def row(matrix: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((matrix.shape[0], 1, matrix.shape[2]), dtype)

    matrices = {name: getattr(experts, name) for name in ("gate", "up", "down")}
    biases = {f"{name}_bias": row(matrix, jnp.bfloat16) for name, matrix in matrices.items()}

    def part(matrix: Any, inputs: int, dtype: str) -> jax.ShapeDtypeStruct:
        rows = matrix.shape[1] // inputs if inputs else 1
        return jax.ShapeDtypeStruct((matrix.shape[0], rows, matrix.shape[2]), jnp.dtype(dtype))

    stored = {
        name: FORMS[form].kind(*(part(matrix, p.inputs, p.dtype) for p in FORMS[form].parts))
        for name, matrix in matrices.items()
    }
    assert "xla.gpu.triton" in lowered(ClampedSwiglu(), (experts.replace(**stored, **biases), *others))


@pytest.mark.parametrize(
    ("activation", "arguments"),
    [
        pytest.param("gelu", shapes(EXPERTS, MODEL, FFN, 2, 3), id="activation"),
        pytest.param("silu", shapes(EXPERTS, MODEL, FFN, 2, 3, jnp.float32), id="dtype"),
        pytest.param("silu", shapes(EXPERTS, MODEL, FFN + 32, 2, 3), id="ffn"),
        pytest.param("silu", shapes(EXPERTS, MODEL + 32, FFN, 2, 3), id="model"),
    ],
)
def test_what_does_not_fit_runs_without_kernels(activation: str, arguments: tuple[Any, ...]) -> None:
    assert "triton" not in lowered(activation, arguments)


def compiled(activation: str = "silu") -> Callable[..., jax.Array]:
    compute = triton_experts(activation)
    return fast_jit(lambda experts, layer, x, routing: compute(experts, layer, x, routing))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tokens", [1, 17, SLOT_TOKENS + 1])
def test_computes_the_same_on_other_platforms(tokens: int, dtype: Any) -> None:
    experts = random_experts(dtype)
    x, routing = random_input(experts, some_choice(tokens))
    check(compiled()(experts, jnp.int32(LAYER), x, routing), experts, x, routing)


@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_every_activation_on_other_platforms(activation: str) -> None:
    experts = random_experts(jnp.float16)
    x, routing = random_input(experts, some_choice(5))
    check(compiled(activation)(experts, jnp.int32(LAYER), x, routing), experts, x, routing, activation)


def test_supported_are_nvidia_gpus_from_ampere_on() -> None:
    capabilities = {"7.5": False, "8.0": True, "8.9": True, "9.0": True, "10.0": True, "12.1": True, "gfx90a": False}
    for capability, expected in capabilities.items():
        assert supported(SimpleNamespace(compute_capability=capability)) == expected, capability
    assert not supported(jax.devices("cpu")[0])


@pytest.fixture
def not_cached() -> Iterator[None]:
    """Programs for absent devices can be written to the compilation cache, but not read back."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason='the CUDA compiler is not installed; it needs no GPU: pip install "jax[cuda12]"',
)
@pytest.mark.usefixtures("not_cached")
@pytest.mark.parametrize(
    ("model", "stored"),
    [("OLMoE-1B-7B", None), ("OLMoE-1B-7B", "int8"), ("gpt-oss-20b", "int8"), ("gpt-oss-20b", "mxfp4")],
)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_89", "sm_90"])
def test_compiles_to_machine_code_and_copies_no_expert(gpu: str, model: str, stored: Quantization | None) -> None:
    from benchmarks.gpu_compile import row
    from moespec_jax.checkpoint.families import read_config
    from moespec_jax.measure.published_shapes import MODELS

    config = read_config(MODELS[model])
    assert row(config, gpu, "triton", 60, config.num_experts, stored)["copies"] == []
