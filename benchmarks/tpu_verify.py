"""Bytes that a verification under an expert budget reads on a TPU, counted without one: `pip install "jax[tpu]"`, then

    python -m benchmarks.tpu_verify --out benchmarks/results

compiles `Speculative.verify` ahead of time for one chip of each generation: a tree of 60 nodes through targets of
published shapes, in bfloat16, batch 1, a cache of 2048 slots, back-end `pallas`. The budgets are a quarter and a half
of the experts, ranked by squared router weights times the draft's probability of the path to a node (score `path`,
credit `squares`), and none: then the kernel has slots for all experts that 60 nodes can select, which here is every
one. As in a greedy round, logits end in the best token of every node. Nothing runs, so there are no times.

Count. As in `tpu_compile.py`, three programs are compiled, because the compiler counts a loop's body once: the real
one, one whose experts compute nothing, and one without layers, the latter two without a budget. From their counts,

    pass = outside + layers * (without experts - outside) + layers * (real - without experts + the kernel's rows)

The counts include the kernels' own estimates: attention's of all its blocks (queries, the layer's cache, mask, result),
the experts' of the weights of all their slots, each once. The kernel's rows are the other blocks of the latter: the
nodes' states in and out, and a column of combine weights a slot, padded as it is stored.

The ideal is every byte that must be read: the chosen experts (without a budget, all) and all other weights once, 60
rows of the embedding, and the cache. Nothing that is written is in it.

HBM. The compiler counts VMEM like HBM: the nodes' states, which need not leave it, and weights that are moved there
first, at every step of the way. `near_mb` is what `tpu_hlo.near_bytes` finds of that in the optimized program, rather
less than there is; HBM is the count without it.

Where not all layers fit one chip, fewer are compiled, and count for all. Large copies and activations: `tpu_hlo.py`.
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu_compile import cache_bytes, ideal_bytes, layers_that_fit, memory_needed, weight_sizes
from benchmarks.tpu_hlo import large_values, near_bytes
from benchmarks.tpu_speculate import TREES, one_chip_round
from benchmarks.tpu_table import verification_table
from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.published_shapes import HEADS, MODELS, draft_config
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.plan.abstract import placed, with_layers
from moespec_jax.plan.ahead import DTYPE, SLOTS, TOPOLOGIES, OutOfMemory, Program, compile_lowered, versions
from moespec_jax.runtime.programs import Programs

TREE, BACKEND = TREES["tree"], BACKENDS["pallas"]
IDLE = BACKEND._replace(compute=lambda _: lambda experts, layer, x, routing: jnp.zeros(x.shape, jnp.float32))
BUDGETS: dict[str, float | None] = {"N/4": 0.25, "N/2": 0.5, "none": None}


def main() -> None:
    """Compile what was asked for and write `tpu_verify.json` and the table made of it, or print the JSON."""
    parser = argparse.ArgumentParser(description="Compile verification under expert budgets for TPUs ahead of time.")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(HEADS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for chip in options.chips:
            rows += examine(model, chip, options.budgets)
            print(json.dumps(rows[-len(options.budgets) :]), file=sys.stderr, flush=True)
    tree = dict(size=TREE.size, depth=TREE.depth, top_k=TREE.top_k)
    report = {"versions": versions(), "slots": SLOTS, "dtype": "bfloat16", "tree": tree, "rows": rows}
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "tpu_verify.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "tpu_verify.md").write_text(verification_table(report))


def examine(model: str, chip: str, budgets: list[str]) -> list[dict[str, Any]]:
    """One row a budget: the program over all layers, or as many as fit the chip."""
    config = read_config(MODELS[model])
    compiled = partial(compile_verification, model, chip)
    shallow = config
    try:
        programs = [compiled(shallow, BACKEND, BUDGETS[name]) for name in budgets]
    except OutOfMemory as error:
        shallow = with_layers(config, layers_that_fit(config, BACKEND, error.available))
        programs = [compiled(shallow, BACKEND, BUDGETS[name]) for name in budgets]
    without_experts = counts(compiled(shallow, IDLE, None))
    outside = counts(compiled(with_layers(config, 0), BACKEND, None))
    rows = []
    for name, program in zip(budgets, programs, strict=True):
        experts = distinct_bound(config, BUDGETS[name])
        copies, activations = large_values(program.hlo, weight_sizes(shallow, BACKEND))
        row = {
            "model": model,
            "chip": chip,
            "backend": BACKEND.name,
            "budget": name,
            "experts": experts,
            "fits": shallow is config,
            "needs_gb": round(memory_needed(config, BACKEND) / 1e9, 2),
            "layers": config.num_hidden_layers,
            "layers_compiled": shallow.num_hidden_layers,
            **bytes_of_a_pass(config, experts, outside, without_experts, counts(program)),
            "temp_mb": round(program.temp_bytes / 1e6, 2),
            "cache_aliased": program.alias_bytes >= cache_bytes(shallow),
            "large_copies": copies,
            "large_activations": activations,
            "compile_s": round(program.compile_s, 1),
        }
        rows.append(row)
    return rows


def bytes_of_a_pass(
    config: DecoderConfig, experts: int, outside: np.ndarray, without_experts: np.ndarray, real: np.ndarray
) -> dict[str, Any]:
    """The compiler's count for a whole pass (see the top of this file), and what of it is near, beside the ideal."""
    parts = {
        "outside": outside,
        "layer": without_experts - outside,
        "experts": real - without_experts,
        "kernel_rows": np.array([kernel_rows(config, experts), 0]),
    }
    in_layers = parts["layer"] + parts["experts"] + parts["kernel_rows"]
    total, near = outside + config.num_hidden_layers * in_layers
    ideal = ideal_bytes(config, BACKEND, experts, TREE.size)
    return {
        "bytes_mb": round(total / 1e6, 1),
        "near_mb": round(near / 1e6, 1),
        "hbm_mb": round((total - near) / 1e6, 1),
        "ideal_mb": round(ideal / 1e6, 1),
        "ratio": round(total / ideal, 3),
        "hbm_ratio": round((total - near) / ideal, 3),
        "parts_mb": {name: [round(size / 1e6, 2) for size in part.tolist()] for name, part in parts.items()},
    }


def counts(program: Program) -> np.ndarray:
    """Bytes accessed by the compiler's count, and those of them in VMEM."""
    return np.array([program.bytes_accessed, near_bytes(program.hlo)])


def kernel_rows(config: DecoderConfig, slots: int) -> int:
    """Bytes of the kernel's blocks beside the weights: states in, sums out, and a padded column a slot."""
    states = TREE.size * config.hidden_size * (DTYPE.dtype.itemsize + 4)
    return states + slots * -(-TREE.size // 8) * 8 * 128 * 4


def distinct_bound(config: DecoderConfig, budget: float | None) -> int:
    """How many experts a layer may read."""
    wanted = min(TREE.size * config.num_experts_per_tok, config.num_experts)
    return wanted if budget is None else round(budget * config.num_experts)


def compile_verification(
    model: str, chip: str, config: DecoderConfig, backend: Backend, budget: float | None
) -> Program:
    """Compile for one chip, the state donated.

    Raises:
        OutOfMemory: parameters and state exceed the chip's memory.
    """
    draft = draft_config(model, config)
    method, params, state = one_chip_round(config, draft, backend, TREE, budget, chip)
    trees = placed(abstract_trees(), state.decoding.length.sharding)
    return compile_lowered(Programs().lower(partial(verify, method), params, state, trees, donate=True))


def verify(
    method: Speculative[Any, Any], params: SpeculativeParams[Any], state: SpeculationState[Any], trees: Tree
) -> tuple[SpeculationState[Any], jax.Array, jax.Array | None]:
    """Verify as a greedy round does.

    Returns:
        The state with the new cache, every node's best token, and the hidden states that the head reads.
    """
    logits, cache, info = method.verify(params, state, trees)
    state = dataclasses.replace(state, decoding=dataclasses.replace(state.decoding, cache=cache))
    return state, jnp.argmax(logits, axis=-1), info.aux_hidden_states


def abstract_trees() -> Tree:
    """One tree without memory behind it."""

    def make() -> Tree:
        ids = jnp.zeros((1, TREE.size), jnp.int32)
        return Tree(ids, ids, jnp.zeros((1, TREE.size), jnp.float32))

    return jax.eval_shape(make)


if __name__ == "__main__":
    main()
