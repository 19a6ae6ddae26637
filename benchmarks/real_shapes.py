"""Speculative rounds at published shapes with and without a budget, on the device at hand: random weights, simulated
acceptance.

    python -m benchmarks.real_shapes --model OLMoE-1B-7B --out benchmarks/results     # one GPU or TPU
    python -m benchmarks.real_shapes --layers 4 --trees 32/4/4 --no-rounds    # a CPU with 24 GB
    python -m benchmarks.real_shapes --model toy                                      # seconds on a CPU

For every tree (size/depth/top-k) and budget: the verification called alone, of distinct tokens, so that they select
as many experts as a tree can; a round inside the compiled loop (the time of many rounds over their number, so that the
host is in it once); and plain decoding's time a token. Everything takes turns in one process, and ratios are of the
same turn: medians and ranges. Beside the verification stands its floor, bytes that it must read over the copy bandwidth
measured here; with `--transformers`, torch's forward pass of such a tree. Nothing here says how many tokens a trained
head would gain, nor what a budget does to quality: the accept length is an argument, the same for every budget, and
marked as simulated.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moespec_jax.bench.random_pair import random_pair, shapes_of
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.round_info import experts_read, experts_wanted, mean_distinct_experts
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.measure.roofline import copy_bandwidth, verification_bytes
from moespec_jax.measure.timing import parse_tree, spread
from moespec_jax.nn.backend import BACKENDS, Backend, default_backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Batch, Run

PROMPT, ROUNDS = 128, 32


class Case(NamedTuple):
    """What takes turns: functions that run once and wait."""

    tree: str
    budget: int | None
    verify: Callable[[], Any]
    rounds: Callable[[], Any] | None
    wanted: float
    read: float


def main() -> int:
    """Time everything and write `real_shapes.json`, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "toy"], default="OLMoE-1B-7B")
    parser.add_argument("--layers", type=int, help="so many layers only, where the model does not fit")
    parser.add_argument("--backend", choices=list(BACKENDS), help="default: the platform's")
    parser.add_argument("--trees", nargs="+", default=["60/7/10", "4/2/1"], metavar="SIZE/DEPTH/TOP-K")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25, 0.125], help="fractions of the experts")
    parser.add_argument("--accept-length", type=float, default=3.0, help="simulated")
    parser.add_argument("--dtype", default="bfloat16" if jax.default_backend() != "cpu" else "float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-rounds", action="store_true", help="time the verification alone")
    parser.add_argument("--transformers", action="store_true", help="time transformers' pass over the tree too")
    parser.add_argument("--out", type=Path, help="directory whose real_shapes.json gets this model's report")
    options = parser.parse_args()
    config, draft = shapes_of(options.model, options.layers)
    backend = BACKENDS[options.backend] if options.backend else default_backend()
    report = measure(config, draft, backend, jnp.dtype(options.dtype), options)
    text = json.dumps(report, indent=1) + "\n"
    if options.out is None:
        print(text)
    else:
        file = options.out / "real_shapes.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {f"{options.model}, {report['device']}": report}, indent=1) + "\n")
    return 0


def measure(
    config: DecoderConfig, draft: DraftConfig, backend: Backend, dtype: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """The report of one model."""
    plain = Autoregressive(config, SamplingConfig(), backend)
    # Tokens spread evenly over the experts: a verification's most.
    params, bandwidth = random_pair(config, draft, backend, dtype, exponent=0.0), copy_bandwidth()
    target = params.target
    cases = []
    for name in options.trees:
        tree = parse_tree(name)
        assert tree is not None
        accept = accept_rule(SamplingConfig(), tree.longest_path, min(options.accept_length, float(tree.longest_path)))
        for fraction in (None, *options.budgets):
            budget = None if fraction is None else resolve(BudgetConfig(fraction), config)
            method = Speculative(plain, Eagle3Drafter(draft), tree, accept, budget)
            cases.append(prepare(name, method, params, with_rounds=not options.no_rounds))
    theirs = {}
    if options.transformers:
        from benchmarks.transformers_verification import tree_passes

        theirs = tree_passes(options.model, config.num_hidden_layers, options.trees, options.dtype, PROMPT)
    steps = None if options.no_rounds else plain_steps(plain, target)
    turns = [take_turn(cases, steps, theirs) for _ in range(options.repeats + 1)][1:]
    return {
        "model": options.model, "layers": config.num_hidden_layers, "backend": backend.name, "dtype": str(dtype),
        "device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})", "weights": "random",
        "copy_gb_per_s": round(bandwidth / 1e9, 1), "repeats": options.repeats,
        "simulated_accept_length": options.accept_length,
        "plain_ms_per_token": None if steps is None else rounded(spread([turn["plain"] for turn in turns])),
        "rows": [row(case, turns, options, config, target, bandwidth, cases) for case in cases],
    }  # fmt: skip


def prepare(
    name: str, method: Speculative[DraftHead, HeadState], params: SpeculativeParams[DraftHead], with_rounds: bool
) -> Case:
    """Compile one case, on the state after a prompt and, if rounds are timed, two of them."""
    margin, config = ROUNDS * method.tree.longest_path * 4, method.target.config
    run = Run(Programs(), method, params, Batch([list(range(1, PROMPT + 1))], [PROMPT + margin], (), 0))
    state = run.state_after(2 if with_rounds else 0)
    trees, drafted = jax.jit(method.propose)(params, state)
    spread_out = jnp.arange(method.tree.size, dtype=jnp.int32)[None, :] * 7919 % config.vocab_size
    verify = partial(jax.jit(method.verify), params, drafted, trees._replace(tokens=spread_out))
    info = verify()[2]
    wanted, read = (float(mean_distinct_experts(of(config, info, 1))) for of in (experts_wanted, experts_read))
    many = partial(jax.jit(method.step), params, state, jnp.int32(ROUNDS))
    bound = None if method.budget is None else method.budget.slots
    return Case(name, bound, verify, many if with_rounds else None, wanted, read)


def plain_steps(method: Autoregressive, target: Decoder) -> Callable[[], Any]:
    """Plain decoding inside its compiled loop."""
    run = Run(Programs(), method, target, Batch([list(range(1, PROMPT + 1))], [PROMPT + 4 * ROUNDS], (), 0))
    return partial(jax.jit(method.step), target, run.state_after(1), jnp.int32(ROUNDS))


def take_turn(
    cases: list[Case], plain: Callable[[], Any] | None, theirs: dict[str, Callable[[], float]]
) -> dict[Any, Any]:
    """Milliseconds of everything, once; a round's and a token's are a loop's over its number."""
    turn: dict[Any, Any] = {"plain": None if plain is None else once(plain) / ROUNDS}
    for number, case in enumerate(cases):
        turn["verify", number] = once(case.verify)
        turn["round", number] = None if case.rounds is None else once(case.rounds) / ROUNDS
    return turn | {("transformers", tree): run() for tree, run in theirs.items()}


def row(
    case: Case, turns: list[Any], options: argparse.Namespace, config: DecoderConfig, target: Any, bandwidth: float,
    cases: list[Case],
) -> dict[str, Any]:  # fmt: skip
    """Medians and ranges of one case, beside the same tree's exact case."""
    number = cases.index(case)
    exact = next(i for i, other in enumerate(cases) if other.tree == case.tree and other.budget is None)
    floor = verification_bytes(config, target, case.read) / bandwidth * 1e3
    verify = spread([turn["verify", number] for turn in turns])
    report: dict[str, Any] = {
        "tree": case.tree, "budget": case.budget, "experts_wanted": round(case.wanted, 1),
        "experts_read": round(case.read, 1), "verify_ms": rounded(verify), "floor_ms": round(floor, 3),
        "share_of_copy_bandwidth": round(floor / verify["median"], 3),
        "verify_over_exact": rounded(spread([turn["verify", number] / turn["verify", exact] for turn in turns])),
    }  # fmt: skip
    if case.rounds is not None:
        length = min(options.accept_length, float(int(case.tree.split("/")[1]) + 2))
        report["round_ms"] = rounded(spread([turn["round", number] for turn in turns]))
        ratios = {"plain": "plain", "exact": ("round", exact)}
        gains = {"plain": length, "exact": 1.0}
        for name, key in ratios.items():
            over = [gains[name] * turn[key] / turn["round", number] for turn in turns]
            report[f"simulated_speed_up_over_{name}"] = rounded(spread(over))
    if ("transformers", case.tree) in turns[0]:
        times = [turn["transformers", case.tree] for turn in turns]
        report["transformers_ms"] = rounded(spread(times))
    return report


def once(run: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return (time.perf_counter() - started) * 1e3


def rounded(values: dict[str, float]) -> dict[str, float]:
    """To what is worth reading."""
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
