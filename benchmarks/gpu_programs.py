"""Whole decoding programs under the CUDA compiler, on a machine without a GPU: `pip install "jax[cuda12]"`, then

    python -m benchmarks.gpu_programs OLMoE-1B-7B triton sm_90

compiles the loop of plain decoding, and of speculative rounds with a chain, a tree, and a tree under a budget of a
quarter of the experts, ahead of time for a GPU as `plan/cuda.py` describes it. Shapes are those of published
checkpoints, bfloat16, batch 1, caches of 1024 slots. It prints one line of JSON for each program. Nothing runs: there
are no times, and no autotuning (see `gpu_compile.py`).

Columns:
    model, backend, gpu, program: what was compiled; trees are size/depth/top-k.
    stacked: true where the parameters of equal layers are stacked and a loop runs over them. `--stacked` and
        `--unstacked` override the back-end's choice.
    compile_s: seconds of lowering and compilation on this machine.
    temp_mb: temporary memory of the program.
    loops: the program itself (`entry`) and every loop in it, by its path in the traced program. `while` is the loop
        over rounds; loops within it run over draft levels, layers and steps of acceptance. `trips` is the trip
        count where it is static (layers, draft levels). `kernels` counts launches of the body (fusions, library calls,
        Pallas kernels, copies) without loops within it, and `condition` those of the test.
    kernels_per_round: launches of one round (one token in plain decoding): body and test of the loop over rounds, with
        every loop in it by its trip count, or once where that is not static.
    large_values: results of 4 MB or more that a program writes to memory, except updates in place, as
        `operation dtype[dims]` with the number of instructions that write one. Slices of stacked weights and caches
        among them are copies; results of custom calls and of matrix multiplications are not.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_compile import COMPUTES, check_compiler
from benchmarks.tpu_hlo import computations, large_values
from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.parallel.mesh import MeshConfig, make_mesh
from moespec_jax.plan.cuda import GPUS, described_devices, installed_versions, lowering_for
from moespec_jax.plan.program import Workload, abstract_round
from moespec_jax.runtime.programs import Programs

SLOTS = 1024
CHAIN, TREE = TreeConfig(depth=2, top_k=1, size=4), TreeConfig(depth=7, top_k=10, size=60)
# A tree of the same size and fewer levels.
SHALLOW = TreeConfig(depth=3, top_k=10, size=60)
# Tree, and fraction of the experts that a verification may read.
PROGRAMS: dict[str, tuple[TreeConfig | None, float | None]] = {
    "plain": (None, None),
    "chain 4/2/1": (CHAIN, None),
    "tree 60/7/10": (TREE, None),
    "tree 60/7/10 N/4": (TREE, 0.25),
    "tree 60/3/10": (SHALLOW, None),
}
# Takes parameters, a state and the number of rounds.
Step = Callable[[Any, Any, Any], Any]
_KERNEL = re.compile(
    r" (fusion|fusion-start|custom-call|copy|copy-start|sort|dynamic-update-slice|all-reduce|convolution|dot)\("
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_PATH = re.compile(r'op_name="(?:jit\(\w+\)/)?([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
# Computations that run in place of a call or a conditional.
_CALLED = re.compile(r"(?:to_apply|true_computation|false_computation|branch_computations)=(%?[\w.\-]+|\{[^}]*\})")


def main() -> None:
    """Compile every program for one model, back-end and GPU, and print a line for each."""
    parser = argparse.ArgumentParser(description="Compile whole decoding programs for a GPU ahead of time.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("backend", choices=COMPUTES)
    parser.add_argument("gpu", choices=GPUS, nargs="?", default="sm_90")
    parser.add_argument("--stacked", action="store_true", default=None, help="stack equal layers and loop over them")
    parser.add_argument("--unstacked", action="store_false", dest="stacked", help="keep layers apart, without a loop")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    options = parser.parse_args()
    if options.backend == "mosaic" and options.gpu != "sm_90":
        parser.error("mosaic needs sm_90")  # other GPUs have no wgmma, over which some compilers end the process
    check_compiler(installed_versions())
    backend = BACKENDS[options.backend]
    if options.stacked is not None:
        backend = backend._replace(stacked=options.stacked)
    for program in options.programs:
        print(json.dumps(examine(options.model, backend, options.gpu, program)), flush=True)


def examine(model: str, backend: Backend, gpu: str, program: str, layers: int | None = None) -> dict[str, Any]:
    """The row of one program, of a model cut to its first `layers`."""
    started = time.perf_counter()
    step, arguments = step_of(model, backend, gpu, program, layers)
    with lowering_for(gpu):
        lowered = Programs().lower(step, *arguments, donate=True)
    compiled = lowered.compile()
    seconds, memory, hlo = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    bodies, entry = computations(hlo), _ENTRY.search(hlo)
    assert entry is not None
    return {
        "model": model, "backend": backend.name, "stacked": backend.stacked, "gpu": gpu, "program": program,
        "compile_s": round(seconds, 1), "temp_mb": round(memory.temp_size_in_bytes / 1e6, 2),
        "loops": loops(bodies, entry[1]), "kernels_per_round": kernels_in_loops(entry[1], bodies),
        # Without sizes of weights: by size alone, a kernel's output may look like a copy.
        "large_values": dict(Counter(large_values(hlo, set())[1])),
    }  # fmt: skip


def step_of(
    model: str, backend: Backend, gpu: str, program: str, layers: int | None = None
) -> tuple[Step, tuple[Any, Any, Any]]:
    """A method's `step`, with parameters, state and number of rounds as shapes on the GPU."""
    cut = {} if layers is None else {"num_hidden_layers": layers}
    config, (tree, budget) = read_config(MODELS[model] | cut), PROGRAMS[program]
    (device,) = described_devices(gpu)
    boundaries = {} if layers is None else {"boundaries": (1, layers // 2, layers - 1)}
    mesh, draft = make_mesh(MeshConfig(), [device]), draft_config(model, config, **boundaries)
    limit = None if budget is None else BudgetConfig(budget)
    method, params, state = abstract_round(Workload(config, draft, mesh, backend, tree or CHAIN, SLOTS, budget=limit))
    rounds, sharding = jax.ShapeDtypeStruct((), jnp.int32), SingleDeviceSharding(device)
    whole = (params.target, state.decoding, rounds) if tree is None else (params, state, rounds)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        # On the device itself, as without a mesh.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return method.target.step if tree is None else method.step, jax.tree.map(place, whole)


def loops(bodies: dict[str, list[str]], entry: str) -> list[dict[str, Any]]:
    """Kernels of the entry computation and of every loop, by path in the traced program."""
    found = []
    for line in (line for body in bodies.values() for line in body):
        if loop := _WHILE.search(line):
            path, (condition, body) = _PATH.search(line), loop.groups()
            row = {"loop": path[1] if path else body, "trips": trips(line), "kernels": kernels(body, bodies)}
            found.append(row | {"condition": kernels(condition, bodies)})
    found.sort(key=lambda row: (row["loop"], -row["kernels"]))
    return [{"loop": "entry", "trips": 1, "kernels": kernels(entry, bodies), "condition": 0}, *found]


def trips(line: str) -> int | None:
    """Trip count of a loop; None where it is not static."""
    known = _TRIPS.search(line)
    return int(known[1]) if known else None


def kernels(name: str, bodies: dict[str, list[str]]) -> int:
    """Launches of one computation without its loops, but with the computations that it calls or branches to."""
    calls = [line for line in bodies[name] if re.search(r" (call|conditional)\(", line)]
    called = [inner for line in calls for names in _CALLED.findall(line) for inner in re.findall(r"[\w.\-]+", names)]
    return sum(bool(_KERNEL.search(line)) for line in bodies[name]) + sum(kernels(inner, bodies) for inner in called)


def kernels_in_loops(name: str, bodies: dict[str, list[str]]) -> int:
    """Launches of the loops of one computation, each by its trip count, or once where that is not static."""
    total = 0
    for line in bodies[name]:
        if loop := _WHILE.search(line):
            condition, body = loop.groups()
            once = kernels(condition, bodies) + kernels(body, bodies) + kernels_in_loops(body, bodies)
            total += (trips(line) or 1) * once
    return total


if __name__ == "__main__":
    main()
