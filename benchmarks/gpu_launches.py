"""Kernels that a round of decoding launches on a GPU, counted without one: `pip install "jax[cuda12]"`, then

    python -m benchmarks.gpu_launches --out benchmarks/results/gpu_programs.json

compiles the programs of `gpu_programs.py` ahead of time under the back-end `fused`, for models cut to 4 and to 8
layers: what a layer launches is a quarter of the difference. A level of the draft launches a quarter of the difference
between trees of 7 and of 3 levels. `tests/test_gpu_launches.py` compiles some of them again,
and fails where a number has grown. Nothing runs, so there are no times.

Columns, beside those of `gpu_programs.py`:
    kernels_per_layer: launches of one layer.
    draft_level: launches of one level of the draft, of which a tree of 60/7/10 has 7; None in plain decoding.
    rest: other launches of a round: head, acceptance, commit, and a tree's pruning.
    kernels_per_round: launches of a round of the whole model.
    temp_mb: temporary memory of the program of 8 layers.
    large_values: results of 4 MB or more in the program of 8 layers, without those of kernels and matrix products.
        A copy of a weight or of a cache would be one of them.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_compile import check_compiler
from benchmarks.gpu_programs import SHALLOW, TREE, examine
from moespec_jax.checkpoint.families import read_config
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.plan.cuda import installed_versions

CASES = [(model, gpu) for model in ("OLMoE-1B-7B", "Qwen3-30B-A3B") for gpu in ("sm_80", "sm_90")]
PROGRAMS = ("plain", "tree 60/7/10", "tree 60/7/10 N/4")
FEW, MORE = 4, 8
LEVELS = TREE.depth


def main() -> None:
    """Write the rows of all cases under `after`, or under another name, beside those that the file has."""
    parser = argparse.ArgumentParser(description="Count the kernels of decoding programs for GPUs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="after", help="key of these rows")
    options = parser.parse_args()
    versions = installed_versions()
    check_compiler(versions)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = [count(model, gpu, program) for model, gpu in CASES for program in PROGRAMS]
    report |= {"versions": versions, options.name: rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def count(model: str, gpu: str, program: str) -> dict[str, Any]:
    """Count the launches of one program."""
    few, more = (examine(model, BACKENDS["fused"], gpu, program, layers) for layers in (FEW, MORE))
    per_layer = (more["kernels_per_round"] - few["kernels_per_round"]) / (MORE - FEW)
    level = None if program == "plain" else draft_level(model, gpu)
    rest = more["kernels_per_round"] - MORE * per_layer - LEVELS * (level or 0)
    layers = read_config(MODELS[model]).num_hidden_layers
    row = {
        "model": model, "gpu": gpu, "program": program, "kernels_per_layer": per_layer, "draft_level": level,
        "rest": rest, "kernels_per_round": rest + layers * per_layer + LEVELS * (level or 0),
        "temp_mb": more["temp_mb"], "large_values": written(more["large_values"]),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


@functools.cache
def draft_level(model: str, gpu: str) -> float:
    """Count the launches of one level of the draft."""
    deep, shallow = (
        examine(model, BACKENDS["fused"], gpu, program, FEW)["kernels_per_round"]
        for program in ("tree 60/7/10", "tree 60/3/10")
    )
    return (deep - shallow) / (TREE.depth - SHALLOW.depth)


def written(values: dict[str, int]) -> dict[str, int]:
    """Leave out what kernels write."""
    return {name: number for name, number in values.items() if not name.startswith("custom-call")}


if __name__ == "__main__":
    main()
