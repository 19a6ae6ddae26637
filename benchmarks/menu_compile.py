"""Compile time and memory of `--speculate auto`'s whole menu, ahead of time, on a machine without the accelerator:
`pip install "jax[tpu]"` or `pip install "jax[cuda12]"`, then

    python -m benchmarks.menu_compile v5e --out benchmarks/results

compiles every shape of the default menu, and the default tree by itself, at OLMoE-1B-7B's shape: bfloat16, batch 1,
caches of 1024 slots. Nothing runs: seconds are those of the machine that compiled, one program after another and
without a cache of programs. Code is what a program takes on the device beside its arguments and temporaries; shapes
run one at a time, so that temporaries of the menu are the largest ones. A chip's rows are added to menu_compile.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.choice import first_choice
from moespec_jax.decoding.menu import Menu, MenuState
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.parallel.mesh import MeshConfig, make_mesh
from moespec_jax.plan.abstract import placed
from moespec_jax.plan.program import Round, Workload, abstract_round
from moespec_jax.runtime.drafters import DEFAULT_TREE, MENU
from moespec_jax.runtime.programs import Programs

MODEL, SLOTS = "OLMoE-1B-7B", 1024
BACKEND = {"v5e": "pallas", "sm_80": "fused", "sm_90": "fused"}
# Takes parameters, a state and the number of rounds.
Step = Callable[[Any, Any, Any], Any]
Arguments = tuple[Any, Any, Any]


def main() -> int:
    """Compile for one chip, and add its rows to `menu_compile.json`, or print them."""
    parser = argparse.ArgumentParser(description="Compile the menu of --speculate auto ahead of time.")
    parser.add_argument("chip", choices=BACKEND)
    parser.add_argument("--out", type=Path, help="directory of menu_compile.json (default: print)")
    options = parser.parse_args()
    device, context, versions = _compiler(options.chip)
    rows = []
    for name, step, arguments in programs(device, BACKEND[options.chip]):
        with context():
            rows.append({"program": name, **compiled(step, placed(arguments, SingleDeviceSharding(device)))})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {options.chip: {"model": MODEL, "backend": BACKEND[options.chip], "versions": versions, "rows": rows}}
    if options.out is None:
        print(json.dumps(report))
        return 0
    file = options.out / "menu_compile.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | report, indent=1) + "\n")
    return 0


def programs(device: Any, backend: str) -> Iterator[tuple[str, Step, Arguments]]:
    """Name, step and arguments without memory behind them: of the default tree by itself, and of every shape."""
    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    alone = _round(device, backend, DEFAULT_TREE)
    yield f"{DEFAULT_TREE.name} alone", alone.method.step, (alone.params, alone.state, rounds)
    # The state of the longest path has room for all.
    widest = _round(device, backend, max(MENU, key=lambda tree: tree.longest_path))
    menu = Menu(tuple(_round(device, backend, tree).method for tree in MENU))
    prices = jax.ShapeDtypeStruct((len(menu.names),), jnp.float32)
    state = MenuState(widest.state, jax.eval_shape(first_choice, prices, prices))
    for name, shape in zip(menu.names, menu.parts, strict=True):
        yield name, shape.step, (widest.params, state, rounds)


def compiled(step: Step, arguments: Arguments) -> dict[str, float]:
    """Seconds of lowering and compilation, and megabytes of a program."""
    started = time.perf_counter()
    program = Programs().lower(step, *arguments, donate=True).compile()
    seconds, memory = time.perf_counter() - started, program.memory_analysis()
    assert memory is not None
    return {
        "compile_s": round(seconds, 1), "code_mb": round(memory.generated_code_size_in_bytes / 1e6, 2),
        "temp_mb": round(memory.temp_size_in_bytes / 1e6, 2),
    }  # fmt: skip


def _round(device: Any, backend: str, tree: TreeConfig) -> Round:
    config, mesh = read_config(MODELS[MODEL]), make_mesh(MeshConfig(), [device])
    return abstract_round(Workload(config, draft_config(MODEL, config), mesh, BACKENDS[backend], tree, SLOTS))


def _compiler(chip: str) -> tuple[Any, Callable[[], Any], dict[str, str]]:
    """The described device, the context of lowering, and versions; either import configures JAX."""
    if chip.startswith("sm_"):
        from moespec_jax.plan.cuda import described_devices, installed_versions, lowering_for

        return described_devices(chip)[0], lambda: lowering_for(chip), installed_versions()
    from moespec_jax.plan.ahead import devices, versions

    jax.config.update("jax_enable_compilation_cache", False)
    return devices(chip)[0], nullcontext, versions()


if __name__ == "__main__":
    sys.exit(main())
