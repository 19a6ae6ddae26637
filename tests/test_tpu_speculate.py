"""A speculative round under the real TPU compiler, which needs no TPU: `pip install "jax[tpu]"` to run these."""

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

CASES = [(tree, backend, "none") for tree in ("tree", "chain") for backend in ("pallas", "slots")]
CASES += [("tree", "pallas", "N/4")]


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    """What the compiler says of a round of two layers of OLMoE-1B-7B on one v5e, by tree, back-end and budget.

    A process of its own, because libtpu stays with the process that loads it.
    """
    command = "-m benchmarks.tpu_speculate --chips v5e --models OLMoE-1B-7B --samplings greedy --layers 2".split()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parent.parent,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {(row["tree"], row["backend"], row["budget"]): row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.parametrize(("tree", "backend", "budget"), CASES)
def test_a_round_updates_caches_in_place_and_copies_no_weights(
    rows: dict[tuple[str, str, str], dict[str, Any]], tree: str, backend: str, budget: str
) -> None:
    row = rows[tree, backend, budget]
    assert row["cache_aliased"]
    assert row["large_copies"] == []
    # Beside the logits of 60 nodes, 12 MB in float32, there is little to hold; one copy of the caches is 50 MB.
    assert row["temp_mb"] < 64
