"""Rounds of block drafting under the compilers of a TPU and a GPU, as committed."""

import json
from pathlib import Path
from typing import Any

import pytest

REPORT = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "block_programs.json").read_text())
ROWS: dict[tuple[str, str], dict[str, Any]] = {
    (row["chip"], row["program"]): row for chip in ("v5e", "sm_90") for row in REPORT[chip]["rows"]
}


def test_the_head_has_the_published_number_of_parameters() -> None:
    assert ROWS["v5e", "DFlash"]["head_parameters_m"] == ROWS["sm_90", "DFlash"]["head_parameters_m"] == 680.8


@pytest.mark.parametrize("program", ["DFlash", "DFlash N/4", "DSpark"])
def test_caches_are_in_place_and_temporaries_are_few(program: str) -> None:
    """Beside the logits of a block there is little to hold, and on a TPU nothing is copied."""
    tpu, gpu = ROWS["v5e", program], ROWS["sm_90", program]
    assert tpu["cache_aliased"] and tpu["large_copies"] == tpu["large_activations"] == {}
    assert max(tpu["temp_mb"], gpu["temp_mb"]) < 24
    assert sum("bf16" in name for name in gpu["large_copies"]) <= 1


def test_a_block_launches_fewer_kernels_than_a_chain_of_levels() -> None:
    chain, block, spark = (ROWS["sm_90", name] for name in ("EAGLE-3, chain of 7", "DFlash", "DSpark"))
    assert block["kernels_per_layer"] == chain["kernels_per_layer"]
    assert block["rest"] < spark["rest"] < chain["rest"]
