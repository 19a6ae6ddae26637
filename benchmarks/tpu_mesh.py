"""What devices of a TPU slice read, hold and exchange, on a machine without one: `pip install "jax[tpu]"`, then

    python -m benchmarks.tpu_mesh --out benchmarks/results

compiles, for a slice spread as `mesh.best_mesh` says, rounds of speculative decoding (memory, copies, collectives) and
the verification of their tree of 60 nodes (bytes), in bfloat16 and with int8 experts, batch 1, a cache of 4096 slots,
back-end `pallas`; without a budget, and with a quarter of the experts, global and balanced. Nothing runs.

Bytes are those of one device. Three programs of a verification without its logits are compiled: the real one, one whose
experts compute nothing, and one without layers; from the compiler's counts (a loop's body counts once)

    pass = outside + layers * (without experts - outside) + layers * (real - without experts) + output head
    experts = real - without experts - rows

are what a pass reads and writes (`hbm_mb`: without what `tpu_hlo.near_bytes` finds of it in VMEM), and what its experts
read in a layer; `rows` are the kernel's other blocks, the nodes' states in and out and a padded column of weights a
slot. The ideal is the weights of the device's share of the experts that a layer may read: of all, of the budget. Under
the global rule any device may have to read as many as it holds, so its kernel has slots for them; those not in use are
not read, but the count takes them for read.

Collectives are those of a round, by kind: how often they run, and the bytes that come out.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.tpu_hlo import copyable_sizes, large_values
from benchmarks.tpu_verify import abstract_trees, counts, verify
from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.collectives import traffic
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.measure.published_shapes import HEADS, MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.parallel.mesh import best_mesh, make_mesh
from moespec_jax.plan.abstract import with_layers
from moespec_jax.plan.ahead import compile_lowered, devices, versions
from moespec_jax.plan.program import Round, Workload, abstract_round, lower_round, on_mesh
from moespec_jax.plan.sizing import HBM, SLICES
from moespec_jax.runtime.programs import Programs

TREE, SLOTS = TreeConfig(7, 10, 60), 4096
PALLAS = BACKENDS["pallas"]
IDLE = PALLAS._replace(compute=lambda _: lambda experts, layer, x, routing: x * 0)
CASES = [("Qwen3-30B-A3B", "v5e-8"), ("Qwen3-30B-A3B", "v6e-8"), ("Mixtral-8x7B", "v5p-8")]
BUDGETS = ("none", "global", "balanced")


def main() -> None:
    """Compile all and write `tpu_mesh.json`."""
    parser = argparse.ArgumentParser(description="Compile rounds for TPU slices ahead of time.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(HEADS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--quantizations", nargs="+", choices=("none", "int8"), default=["none", "int8"])
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    rows = []
    for model, where in CASES:
        for quantization in options.quantizations if model in options.models else ():
            for budget in options.budgets:
                if budget == "balanced" and mesh_of(model, where).shape["expert"] == 1:
                    continue
                rows.append(examine(model, where, None if quantization == "none" else quantization, budget))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {"versions": versions(), "slots": SLOTS, "tree": [TREE.size, TREE.depth, TREE.top_k], "rows": rows}
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="") if options.out is None else (options.out / "tpu_mesh.json").write_text(text)


def mesh_of(model: str, where: str) -> Mesh:
    """The slice's devices, spread as suits the model."""
    topology, count = SLICES[where]
    chips = devices(where.partition("-")[0], topology)[:count]
    return make_mesh(best_mesh(read_config(MODELS[model]), count), chips)


def examine(model: str, where: str, quantization: Any, budget: str) -> dict[str, Any]:
    """One row."""
    mesh, config = mesh_of(model, where), read_config(MODELS[model])
    groups = mesh.shape["expert"] if budget == "balanced" else 1
    rule = None if budget == "none" else BudgetConfig(0.25, groups=groups)

    def planned(backend: Backend = PALLAS, layers: int = config.num_hidden_layers) -> Round:
        cut = config if layers == config.num_hidden_layers else with_layers(config, layers)
        draft = draft_config(model, cut, **({} if cut is config else {"boundaries": (0, 0, 0)}))
        limit = rule if cut.num_sparse_layers else None
        return abstract_round(Workload(cut, draft, mesh, backend, TREE, SLOTS, 1, limit, quantization))

    round_ = planned()
    whole = compile_lowered(lower_round(round_, mesh))
    decoding, draft_cache = round_.state.decoding, round_.state.draft.cache
    caches = (decoding.cache.k, decoding.cache.v, draft_cache.k, draft_cache.v)
    moved, found = traffic(whole.hlo), large_values(whole.hlo, copyable_sizes(config, (round_.params, caches)))
    real, idle, outside = (count(r, mesh) for r in (round_, planned(IDLE), planned(layers=0)))
    passed = outside + config.num_hidden_layers * (real - outside) + [local_bytes(round_.params.target.lm_head), 0]
    memory = whole.argument_bytes + whole.temp_bytes
    return {
        "model": model, "slice": where, "mesh": dict(mesh.shape), "experts": quantization or "bfloat16",
        "budget": budget, "memory_gb": round(memory / 1e9, 2), "hbm_gb": round(HBM[where[:3]] / 1e9, 2),
        "temp_mb": round(whole.temp_bytes / 1e6, 1), "cache_aliased": whole.alias_bytes >= local_bytes(caches),
        "large_copies": found[0],
        "pass_mb": round(passed[0] / 1e6, 1), "hbm_mb": round((passed[0] - passed[1]) / 1e6, 1),
        **expert_bytes(config, round_, mesh, budget, (real - idle)[0]),
        "collectives": {kind: [moved.runs[kind], moved.size[kind]] for kind in sorted(moved.runs)},
        "collective_mb": round(moved.size.total() / 1e6, 2), "compile_s": round(whole.compile_s, 1),
    }  # fmt: skip


def count(round_: Round, mesh: Mesh) -> np.ndarray:
    """Bytes that the compiler counts in one verification, and those of them in VMEM."""
    trees = on_mesh(mesh, abstract_trees(), BY_SEQUENCE)
    method, params, state = round_
    function, specs = partial(pass_over_layers, method), (method.specs(params)[0], BY_SEQUENCE)
    return counts(compile_lowered(Programs(mesh).lower(function, params, state, trees, donate=True, specs=specs)))


def pass_over_layers(
    method: Speculative[Any, Any], params: SpeculativeParams[Any], state: SpeculationState[Any], trees: Tree
) -> tuple[SpeculationState[Any], Any]:
    """A verification without logits, whose way in and out of VMEM would blur the count."""
    state, _, aux_hidden_states = verify(method, params, state, trees)
    return state, aux_hidden_states


def expert_bytes(config: DecoderConfig, round_: Round, mesh: Mesh, budget: str, counted: int) -> dict[str, Any]:
    """What a device's experts read in a layer, and what they would at best."""
    experts = round_.params.target.experts
    assert isinstance(experts, Flat)
    one = sum(local_bytes(leaf) // leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(experts))
    allowed = config.num_experts if budget == "none" else round(config.num_experts / 4)
    slots = min(experts.num_experts, TREE.size * config.num_experts_per_tok)
    slots = slots if budget == "none" else min(allowed, slots)
    if budget == "balanced":
        slots = -(-allowed // mesh.shape["expert"])
    states = TREE.size * config.hidden_size * (2 + 4)
    read = counted - states - slots * -(-TREE.size // 8) * 8 * 128 * 4
    ideal = allowed / mesh.shape["expert"] * one
    return {
        "slots": slots, "expert_mb": round(read / 1e6, 2), "ideal_expert_mb": round(ideal / 1e6, 2),
        "expert_ratio": round(read / ideal, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
