"""Speculative against plain decoding on this machine: `python -m benchmarks.speculation --out benchmarks/results`.

The embedded pair on held-out prompts, batch 1, greedy, float32. All settings take turns in one process: in every
repeat each decodes all prompts, and its speed is divided by plain decoding's of the same repeat; compilation and
prefill do not count. Then one round of each tree is timed in parts, on the state it has after eight rounds: the draft
(extending the head's cache and growing the tree), the verification (the target's pass over the tree), and the rest
(acceptance, keeping the path) as what the whole round takes more.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.acceptance import check_trees
from moespec_jax.cli.command import Parser, run_command
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.measure.timing import spread
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

NEW = 128
CHAINS = [(depth + 2, depth, 1) for depth in (0, 1, 2, 3, 4, 6)]
BRANCHED = [(4, 1, 2), (6, 2, 2), (8, 3, 2), (16, 4, 4), (60, 7, 10)]
TREES = {f"{size}/{depth}/{top_k}": TreeConfig(depth, top_k, size) for size, depth, top_k in CHAINS + BRANCHED}


def main(argv: Sequence[str] | None = None) -> int:
    """Time everything and write `speculation.json`, or print it; returns the exit status: 0, 2 for a head that cannot
    draft the trees, or another error that the user can fix."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory to write speculation.json to (default: print)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES), metavar="SIZE/DEPTH/TOP-K")
    parser.add_argument(
        "--draft-model", help="another head for the embedded target; DFlash and DSpark: with --trees of chains"
    )
    return run_command(parser, _run, argv)


def _run(options: argparse.Namespace) -> None:
    model = load(draft_model=options.draft_model, dtype="float32")
    trees: dict[str, TreeConfig | None] = {"plain": None, **{name: TREES[name] for name in options.trees}}
    check_trees(model, trees.values())
    prompts = held_out_pieces(model, options.prompts)
    turns = [
        {name: decode_all(model, prompts, tree) for name, tree in trees.items()} for _ in range(options.repeats + 1)
    ]
    report: dict[str, Any] = {"prompts": len(prompts), "new_tokens": NEW, "repeats": options.repeats, "rows": []}
    for name, tree in trees.items():
        # The first turn compiles and warms up.
        seconds = [turn[name]["s_per_token"] for turn in turns[1:]]
        ratios = [turn["plain"]["s_per_token"] / turn[name]["s_per_token"] for turn in turns[1:]]
        row = {"tree": name, "ms_per_token": spread([s * 1e3 for s in seconds]), "speed_up": spread(ratios)}
        row["accept_length"] = turns[-1][name]["accept_length"]
        row["same_tokens_as_plain"] = turns[-1][name]["tokens"] == turns[-1]["plain"]["tokens"]
        report["rows"].append(row | ({} if tree is None else {"round_ms": time_round(model, prompts[0], tree)}))
        print(json.dumps(report["rows"][-1]), file=sys.stderr)
    report |= turns[-1]["plain"]["where"]
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "speculation.json").write_text(json.dumps(report, indent=1) + "\n")


def decode_all(
    model: Model, prompts: list[list[int]], tree: TreeConfig | None, budget: BudgetConfig | None = None
) -> dict[str, Any]:
    """Seconds a token over all prompts, one after another."""
    results = [model.generate([p], tree=tree, budget=budget, max_new_tokens=NEW, ignore_eos=True) for p in prompts]
    tokens = [r.prompts[0].token_ids for r in results]
    rounds = sum(r.prompts[0].rounds for r in results)
    return {
        "s_per_token": sum(r.decode_s for r in results) / sum(len(ids) - 1 for ids in tokens),
        "accept_length": round(sum(r.prompts[0].accept_length * r.prompts[0].rounds for r in results) / rounds, 3),
        "tokens": tokens,
        "experts_read": round(sum(r.experts_read for r in results) / len(results), 2),
        "where": {"device": results[0].device, "dtype": results[0].dtype, "versions": results[0].versions},
    }


def time_round(model: Model, prompt: list[int], tree: TreeConfig) -> dict[str, Any]:
    """Milliseconds of a whole round and of its parts, each a program of its own."""
    method, params = model.speculative(DecodingSpec(tree), SamplingConfig()), model.speculative_params
    state = Run(model.programs, method, params, Batch([prompt], [len(prompt) + NEW], (), 0)).state_after(8)
    trees, drafted = jax.jit(method.propose)(params, state)
    parts = {
        "round": timed(jax.jit(method.round), params, state),
        "draft": timed(jax.jit(partial(draft_only, method)), params, state),
        "verify": timed(jax.jit(method.verify), params, drafted, trees),
    }
    parts["rest"] = {"median": parts["round"]["median"] - parts["draft"]["median"] - parts["verify"]["median"]}
    return {name: {key: round(value, 3) for key, value in part.items()} for name, part in parts.items()}


def draft_only(
    method: Speculative[Any, Any], params: SpeculativeParams[Any], state: SpeculationState[Any]
) -> tuple[Tree, Any]:
    """Draft trees; of the state after it return the drafter's part alone, or the target's cache would be copied."""
    trees, after = method.propose(params, state)
    return trees, after.draft


def timed(function: Callable[..., Any], *arguments: Any, repeats: int = 50) -> dict[str, float]:
    """Milliseconds of one call: median, lowest and highest."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append((time.perf_counter() - started) * 1e3)
    return spread(times)


if __name__ == "__main__":
    sys.exit(main())
