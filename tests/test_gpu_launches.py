"""Kernels of whole programs on GPUs: the committed table, and some compiled again where the compiler is installed."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from moespec_jax.nn.backend import BACKENDS

REPORT = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "gpu_programs.json").read_text())
ROWS = {(row["model"], row["gpu"], row["program"]): row for row in REPORT["after"]}
NUMBERS = ("kernels_per_layer", "draft_level", "rest", "temp_mb")


def grown(row: dict[str, Any], limit: dict[str, Any]) -> list[str]:
    """Names of the numbers that are larger than the table's, and of new large values."""
    more = [name for name in NUMBERS if (row[name] or 0) > (limit[name] or 0)]
    return more + sorted(set(row["large_values"]) - set(limit["large_values"]))


@pytest.mark.parametrize("before", REPORT["before"], ids=lambda row: f"{row['model']} {row['gpu']} {row['program']}")
def test_there_are_fewer_kernels_than_before_and_no_weight_is_copied(before: dict[str, Any]) -> None:
    after = ROWS[before["model"], before["gpu"], before["program"]]
    most = {"plain": 13, "tree 60/7/10": 16, "tree 60/7/10 N/4": 17}[after["program"]]
    assert after["kernels_per_layer"] <= most < before["kernels_per_layer"]
    assert after["kernels_per_round"] < 0.7 * before["kernels_per_round"]
    assert (after["draft_level"] or 0) <= (before["draft_level"] or 0)
    assert not any("bf16" in name for name in after["large_values"])  # as weights and caches are


def test_what_has_grown_is_named() -> None:
    row = {"kernels_per_layer": 12.0, "draft_level": None, "rest": 20.0, "temp_mb": 1.0, "large_values": {}}
    assert grown(row, row) == []
    assert grown(row | {"rest": 21.0, "large_values": {"copy bf16[2048,2048]": 1}}, row) == [
        "rest",
        "copy bf16[2048,2048]",
    ]


@pytest.fixture
def not_cached() -> Iterator[None]:
    """Programs for absent devices can be written to the compilation cache, but not read back."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason='the CUDA compiler is not installed; it needs no GPU: pip install "jax[cuda12]"',
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(REPORT["versions"]["jax"] != jax.__version__, reason="the table is of another version of JAX")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("not_cached")
@pytest.mark.parametrize(
    "case", [("OLMoE-1B-7B", "sm_80", "plain"), ("Qwen3-30B-A3B", "sm_90", "tree 60/7/10 N/4")], ids=" ".join
)
def test_no_number_of_the_table_grows(case: tuple[str, str, str]) -> None:
    from benchmarks.gpu_launches import count

    assert grown(count(*case), ROWS[case]) == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("not_cached")
@pytest.mark.parametrize("model", ["OLMoE-1B-7B", "Qwen3-30B-A3B"])
def test_the_default_chain_writes_no_product_of_a_weight(model: str) -> None:
    """A level of a chain has one row, for which XLA may write the elementwise product of a matrix and the row."""
    from benchmarks.gpu_launches import written
    from benchmarks.gpu_programs import examine

    row = examine(model, BACKENDS["fused"], "sm_90", "chain 4/2/1", layers=4)
    assert not any("bf16" in name for name in written(row["large_values"]))
