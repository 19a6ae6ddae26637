"""A speculative round under the TPU compiler, on a machine without a TPU: `pip install "jax[tpu]"`, then

    python -m benchmarks.tpu_speculate --out benchmarks/results

compiles `Speculative.step` ahead of time: one `lax.while_loop` that drafts a tree, verifies it, accepts a path
and keeps its cache rows. Targets have the shapes of published checkpoints, with an EAGLE-3 head of 32000 tokens;
bfloat16, batch 1, caches of 2048 slots. Some verify under a budget of a quarter of the experts (score `path`, credit
`squares`). Nothing runs, so there are no times: sizes and copies are the compiler's own.
The committed compile seconds are from two cores busy with other work, and say only that it is a matter of a minute.

Memory is that of one device: arguments (parameters, caches and the rest of the state, as the chip's layouts pad them)
and temporaries. Caches are in place if all bytes of them that go in come out in the same memory. Large copies and large
activations: see `tpu_hlo.py`. Where VMEM has room for the head's cache (v6e; v5e, sampled), it moves there for part of
a round, and its way back to where it was counts as a copy. The activations are the attention scores of a tree (`slots`
on v5p).

What several chips hold and exchange: `tpu_mesh.py`.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.tpu_hlo import copyable_sizes, large_values
from benchmarks.tpu_table import speculation_table
from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.measure.published_shapes import HEADS, MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.parallel.mesh import MeshConfig, make_mesh
from moespec_jax.plan.abstract import placed, with_layers
from moespec_jax.plan.ahead import SLOTS, TOPOLOGIES, compile_lowered, devices, versions
from moespec_jax.plan.program import Round, Workload, abstract_round
from moespec_jax.runtime.programs import Programs

TREES = {"tree": TreeConfig(depth=7, top_k=10, size=60), "chain": TreeConfig(depth=2, top_k=1, size=4)}
BUDGETS: dict[str, float | None] = {"none": None, "N/4": 0.25}
SAMPLINGS = {"greedy": SamplingConfig(), "sampled": SamplingConfig(temperature=1.0, top_p=0.9)}


class Case(NamedTuple):
    """One row of the report."""

    model: str
    chip: str
    backend: str
    tree: str
    sampling: str = "greedy"
    budget: str = "none"


def main() -> None:
    """Compile what was asked for and write `tpu_speculate.json` and the table made of it, or print the JSON."""
    parser = argparse.ArgumentParser(description="Compile speculative rounds for TPUs ahead of time.")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(HEADS))
    parser.add_argument("--backends", nargs="+", choices=("pallas", "slots"), default=["pallas", "slots"])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--samplings", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--layers", type=int, help="compile this many layers only")
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    rows = []
    for case in all_cases():
        chosen = zip(case, (getattr(options, f"{name}s") for name in Case._fields), strict=True)
        if all(value in allowed for value, allowed in chosen):
            rows.append(examine(case, options.layers))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {"versions": versions(), "slots": SLOTS, "dtype": "bfloat16", "rows": rows}
    report["trees"] = {name: dict(size=t.size, depth=t.depth, top_k=t.top_k) for name, t in TREES.items()}
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "tpu_speculate.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "tpu_speculate.md").write_text(speculation_table(report))


def all_cases() -> list[Case]:
    """Two models on every chip that holds them with every back-end and tree, greedily; one that samples; some with a
    budget."""
    cases = [
        Case(model, chip, backend, tree)
        for model, chips in (("OLMoE-1B-7B", list(TOPOLOGIES)), ("Qwen3-30B-A3B", ["v5p"]))
        for chip in chips
        for backend in ("pallas", "slots")
        for tree in TREES
    ]
    budgeted = [
        *(Case("OLMoE-1B-7B", chip, "pallas", "tree", budget="N/4") for chip in TOPOLOGIES),
        Case("Qwen3-30B-A3B", "v5p", "pallas", "tree", budget="N/4"),
        Case("Mixtral-8x7B", "v5p", "pallas", "tree", budget="N/4"),
    ]
    return [*cases, Case("OLMoE-1B-7B", "v5e", "pallas", "tree", "sampled"), *budgeted]


def examine(case: Case, layers: int | None) -> dict[str, Any]:
    """One row of the report, over `layers` layers (None: all)."""
    config = read_config(MODELS[case.model])
    draft = draft_config(case.model, config)
    if layers is not None:
        config = with_layers(config, layers)
        draft = draft_config(case.model, config, boundaries=(0, layers // 2, layers))
    method, params, state = one_chip_round(
        config, draft, BACKENDS[case.backend], TREES[case.tree], BUDGETS[case.budget], case.chip
    )
    sampling = SAMPLINGS[case.sampling]
    accept = accept_rule(sampling, method.tree.longest_path)
    method = dataclasses.replace(method, target=dataclasses.replace(method.target, sampling=sampling), accept=accept)
    state = dataclasses.replace(state, sampling=sampling)
    rounds = placed(jax.ShapeDtypeStruct((), jnp.int32), state.decoding.length.sharding)
    program = compile_lowered(Programs().lower(method.step, params, state, rounds, donate=True))
    caches = (state.decoding.cache.k, state.decoding.cache.v, state.draft.cache.k, state.draft.cache.v)
    copies, activations = large_values(program.hlo, copyable_sizes(config, (params, caches)))
    return {
        **case._asdict(),
        "layers": config.num_hidden_layers,
        "weights_gb": round(local_bytes(params) / 1e9, 2),
        "arguments_gb": round(program.argument_bytes / 1e9, 2),
        "temp_mb": round(program.temp_bytes / 1e6, 2),
        "memory_gb": round((program.argument_bytes + program.temp_bytes) / 1e9, 2),
        "cache_mb": round(local_bytes(caches) / 1e6, 1),
        "cache_aliased": program.alias_bytes >= local_bytes(caches),
        "large_copies": copies,
        "large_activations": activations,
        "compile_s": round(program.compile_s, 1),
    }


def one_chip_round(
    config: DecoderConfig, draft: DraftConfig, backend: Backend, tree: TreeConfig, budget: float | None, chip: str
) -> Round:
    """A greedy round of one sequence on one chip, as the library runs it there: without a mesh. `budget` is a fraction
    of the experts, by squared router weights and the draft's probabilities."""
    device = devices(chip)[0]
    limit = None if budget is None else BudgetConfig(budget, score="path", credit="squares")
    mesh = make_mesh(MeshConfig(), [device])
    round_ = abstract_round(Workload(config, draft, mesh, backend, tree, SLOTS, budget=limit))
    return Round(round_.method, *placed((round_.params, round_.state), SingleDeviceSharding(device)))


if __name__ == "__main__":
    main()
