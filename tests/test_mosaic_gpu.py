"""The Hopper kernels: emulated against float64 products, lowered for CUDA at real shapes, and who takes their place."""

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
    LAYERS,
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

from moespec_jax.nn.experts.distinct_gpu import list_distinct
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.mosaic_gpu import KERNEL_ACTIVATIONS, STAGES, TILE, mosaic_experts, slot_outputs, supported
from moespec_jax.nn.routing import Routing

# What the compiler must know of an H100.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def emulate(activation: str, experts: Flat, x: jax.Array, routing: Routing) -> jax.Array:
    """The kernels step by step on the CPU, copies and barriers included; what was not written reads as NaN."""
    # Public from jax 0.12 on.
    emulator = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    outputs = partial(slot_outputs, interpret=emulator.InterpretGPUParams())
    return jax.jit(by_slots(activation, outputs))(experts, x, routing)


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
    clean = jax.tree.map(jnp.nan_to_num, experts)
    check(emulate("silu", experts, x, routing), clean, x, routing)


@pytest.mark.parametrize("activation", [name for name in oracles.ACTIVATIONS if name in KERNEL_ACTIVATIONS])
def test_activations_emulated(activation: str) -> None:
    experts = random_experts(jnp.float16)
    x, routing = random_input(experts, [[2, 0]])
    check(emulate(activation, experts, x, routing), experts, x, routing, activation)


def test_more_steps_than_buffers_and_several_column_tiles() -> None:
    experts = random_experts(model=(STAGES + 2) * TILE, ffn=2 * TILE)
    x, routing = random_input(experts, some_choice(9))
    check(emulate("silu", experts, x, routing), experts, x, routing)


def test_slots_are_no_more_than_the_routing_allows() -> None:
    experts = random_experts()
    x, routing = random_input(experts, [[4, 1], [1, 4], [4, 1]])
    routing = routing.replace(max_distinct=3)
    assert len(list_distinct(routing, EXPERTS, interpret=True)[0]) == 3
    check(emulate("silu", experts, x, routing), experts, x, routing)


@pytest.mark.parametrize("tokens", [TILE, TILE + 1])
def test_a_full_tile_of_tokens_and_one_more(tokens: int) -> None:
    experts = random_experts()
    x, routing = random_input(experts, some_choice(tokens))
    check(emulate("silu", experts, x, routing), experts, x, routing)


# The emulator multiplies with numpy, which minds 0 * inf in rows that are not used.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_an_infinite_expert_leaves_other_tokens_alone() -> None:
    experts = random_experts()
    experts = experts.replace(down=experts.down.at[LAYER * EXPERTS + 4].set(jnp.inf))
    x, routing = random_input(experts, [[4, 1], [1, 2]])
    got = np.asarray(emulate("silu", experts, x, routing))
    assert not np.isfinite(got[0]).any() and np.isfinite(got[1]).all()


def lowered(activation: str, arguments: tuple[Any, ...]) -> str:
    return jax.jit(mosaic_experts(activation)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("model", REAL)
def test_lowers_at_real_shapes_and_nothing_but_the_kernels_touches_weights(model: str) -> None:
    experts, width, ffn, active = REAL[model]
    text = lowered("silu", shapes(experts, width, ffn, active, tokens=60))
    matrix = re.compile(rf"tensor<(\d+x)*({width}x{ffn}|{ffn}x{width})xbf16>")
    touching = [line.strip() for line in text.splitlines() if matrix.search(line)]
    calls = [line for line in touching if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 2 and not any(matrix.search(line.rsplit("->", 1)[1]) for line in calls)
    assert [line[:9] for line in touching if line not in calls] == ["func.func"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, TILE])
def test_every_activation_and_dtype_lowers(activation: str, dtype: Any, tokens: int) -> None:
    assert "custom_call @mosaic_gpu" in lowered(activation, shapes(EXPERTS, MODEL, FFN, 2, tokens, dtype))


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
    assert "mosaic_gpu" not in lowered(activation, arguments)


def compiled(activation: str = "silu") -> Callable[..., jax.Array]:
    compute = mosaic_experts(activation)
    return fast_jit(lambda experts, layer, x, routing: compute(experts, layer, x, routing))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("tokens", [1, 17, TILE, TILE + 1, 130])
def test_computes_the_same_on_other_platforms(tokens: int, dtype: Any) -> None:
    experts = random_experts(dtype)
    x, routing = random_input(experts, some_choice(tokens))
    check(compiled()(experts, jnp.int32(LAYER), x, routing), experts, x, routing)


@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_every_activation_on_other_platforms(activation: str) -> None:
    experts = random_experts(jnp.float16)
    x, routing = random_input(experts, some_choice(5))
    check(compiled(activation)(experts, jnp.int32(LAYER), x, routing), experts, x, routing, activation)


def test_supported_is_hopper_alone() -> None:
    capabilities = {"8.0": False, "8.9": False, "9.0": True, "10.0": False, "12.0": False, "gfx90a": False}
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
@pytest.mark.parametrize("model", REAL)
def test_compiles_to_machine_code_for_hopper_and_copies_no_expert(model: str) -> None:
    from jax.experimental import topologies

    device = topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=H100).devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    experts, width, ffn, active = REAL[model]
    arguments = jax.tree.map(lambda s: s.update(sharding=placed), shapes(experts, width, ffn, active, tokens=60))

    def layers(flat: Flat, layer: jax.Array, x: jax.Array, routing: Routing) -> jax.Array:
        compute = mosaic_experts("silu")
        many = jnp.arange(LAYERS, dtype=jnp.int32)
        return jax.lax.scan(lambda x, i: (x + compute(flat, i, x, routing).astype(x.dtype), None), x, many)[0]

    text = jax.jit(layers).trace(*arguments).lower().compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2
    results = re.findall(rf"= \(?bf16\[(?:\d+,)*(?:{width},{ffn}|{ffn},{width})\]\S* ([\w-]+)\(", text)
    assert {"parameter"} <= set(results) <= {"parameter", "get-tuple-element", "bitcast"}
