"""The decoding program under the real TPU compiler, which needs no TPU: `pip install "jax[tpu]"` to run these."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """What the compiler says of OLMoE-1B-7B's decoding on one v6e, by back-end.

    All 16 layers: they are one scan, so fewer compile no faster, and the stacked weights of two would fit VMEM whole,
    which no real model's do. A process of its own, because libtpu stays with the process that loads it.
    """
    command = "-m benchmarks.tpu_compile --chips v6e --models OLMoE-1B-7B --programs decode".split()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parent.parent,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["backend"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.parametrize("backend", ["slots", "pallas"])
def test_decoding_reads_each_needed_byte_about_once(rows: dict[str, dict[str, Any]], backend: str) -> None:
    # The count includes what stays in VMEM, so that 1.0 is out of reach.
    assert 1.0 <= rows[backend]["ratio"] <= 1.1


@pytest.mark.parametrize("backend", ["slots", "pallas"])
def test_decoding_copies_neither_weights_nor_cache(rows: dict[str, dict[str, Any]], backend: str) -> None:
    row = rows[backend]
    assert row["layers_compiled"] == row["layers"]
    assert row["large_copies"] == row["large_activations"] == []
    assert row["cache_aliased"]
    assert row["temp_mb"] < 4
