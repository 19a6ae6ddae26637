"""Measure whether speculative decoding pays on this model, device and prompts.

Times plain decoding and draft trees, each tree without a budget (exact) and
under expert budgets (in general lossy). All settings are timed in turn in one
process, after a warm-up, with greedy decoding. Reports the speed of each
setting and its ratio to plain decoding, to the same tree without a budget and
to the fastest exact setting; acceptance; experts read; and the share of the
device's copy bandwidth that is reached.

Without arguments: the embedded pair on held-out Python modules. With --random:
shapes of published models with random weights, simulated acceptance and
simulated routing, without a download.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moespec_jax.bench.random_pair import EXPONENTS, check_memory, published_accept_length, random_model, shapes_of
from moespec_jax.bench.rows import result_rows
from moespec_jax.bench.sweep import add_sweep_flags, check_sweep, sweep
from moespec_jax.bench.table import report
from moespec_jax.bench.verification import decode_and_verify
from moespec_jax.cli.arguments import add_mesh_flag, add_model_flags, backend_of, load_requested, shown_name
from moespec_jax.cli.budget_flags import check_budget
from moespec_jax.cli.command import command_parser, require_matplotlib, run_command, write_tables
from moespec_jax.config import TreeConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import json_line, write_text
from moespec_jax.measure.ledger import Ledger, digest
from moespec_jax.measure.prompt_sets import PIECE, add_prompt_set_flags, check_prompt_sets, prompt_sets
from moespec_jax.measure.roofline import copy_bandwidth, verification_bytes
from moespec_jax.measure.timing import TimingCase, time_interleaved
from moespec_jax.runtime.load import DEMO_TARGET
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import device_name, versions

EXAMPLE = """
examples:
  python -m moespec_jax.bench
  python -m moespec_jax.bench --model MODEL --draft-model HEAD --chat --prompts mine=prompts.jsonl \\
      --config-list 1,0,0,0 1,3,1,4 1,8,10,60 --budgets 0.5 0.25
  python -m moespec_jax.bench --random qwen3-30b-a3b --trees 4/2/1 60/7/10 --budgets 32 16 --output qwen3

After an interruption, the same command continues with the turns that are missing.
"""
# Names on the command line, and the published models of those shapes.
SHAPES = {name.lower(): name for name in EXPONENTS}
RANDOM_PROMPTS = "random tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", __doc__, EXAMPLE)
    add_model_flags(group := parser.add_argument_group("model"))
    add_mesh_flag(group)
    group = parser.add_argument_group("random weights instead of a model (for times only, the text is meaningless)")
    group.add_argument(
        "--random", choices=list(SHAPES), help="shape of the model; acceptance and skew of the routing are simulated"
    )
    group.add_argument(
        "--layers", type=int, metavar="N", help="number of layers, where the whole model does not fit (default: all)"
    )
    group.add_argument(
        "--accept-length",
        type=float,
        metavar="X",
        help="simulated mean number of tokens that a round gains, for every tree (default: from 2.3 for a tree of 5"
        " tokens to 3.7 for one of 60)",
    )
    add_sweep_flags(parser.add_argument_group("settings to compare"))
    group = parser.add_argument_group("prompts")
    add_prompt_set_flags(group, count=8)
    group.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens for each prompt (default: 64)")
    group.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="turns, after one that warms up (default: 5)"
    )
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompts")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("bench"), metavar="DIR",
        help="directory of the results: bench.jsonl (a row for each setting), bench.md, bench.png, and turns.jsonl (all"
        " measurements, from which an interrupted command continues) (default: bench)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the rows of bench.jsonl instead of the table")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    cases = sweep(arguments, _simulation(arguments))
    model = _model(arguments, list(cases.values()))
    cases = sweep(arguments, _simulation(arguments), model.draft)
    sets = _prompts(arguments, model)
    for prompts in sets.values():
        check_sweep(list(cases.values()), model, len(prompts))
    about = _about(model, arguments)
    file = arguments.output / "turns.jsonl"
    ledger = Ledger(file, about | _requested(cases, sets))
    if len(ledger) == 1 + arguments.repeats * len(cases) * len(sets):
        print(f"{file} has all turns: nothing is measured; remove it to measure again", file=sys.stderr)
    bandwidth = ledger.task("bytes copied in a second", copy_bandwidth)
    about["copy_gb_per_s"] = bandwidth / 1e9
    rows = []
    for name, prompts in sets.items():
        turns = time_interleaved(
            model, prompts, cases, arguments.tokens, arguments.repeats, ledger, decode_and_verify, f"{name}: turn"
        )
        sample = {"prompts": name, "count": len(prompts)}
        rows += result_rows(cases, turns, _floor(model, bandwidth), about | sample)
    _write(rows, arguments)


def _write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    # Only the figure needs matplotlib, which takes long to import: `_check` finds it, this imports it.
    from moespec_jax.bench.chart import write_chart

    lines, text = "".join(map(json_line, rows)), report(rows)
    write_text(arguments.output / "bench.jsonl", lines)
    write_text(arguments.output / "bench.md", text)
    write_chart(rows, arguments.output / "bench.png")
    write_tables(lines if arguments.json else text)


def _check(arguments: argparse.Namespace) -> None:
    """Check the flags, before a model is loaded."""
    require_matplotlib()
    for name, least in {"tokens": 2, "repeats": 1}.items():
        if getattr(arguments, name) < least:
            raise RequestError(f"expected --{name} of at least {least}; got {getattr(arguments, name)}")
    length = arguments.accept_length
    if length is not None and not 1.0 <= length < float("inf"):
        raise RequestError(f"expected --accept-length of at least 1, the least that a round gains; got {length}")
    check_prompt_sets(arguments)
    if arguments.random is None:
        for flag in ("layers", "accept_length"):
            if getattr(arguments, flag) is not None:
                raise RequestError(f"--{flag.replace('_', '-')} applies to random weights; expected --random with it")
    elif arguments.prompts or arguments.chat or arguments.draft_model or arguments.model != DEMO_TARGET:
        raise RequestError(
            "--random has no text, and a head of its own; expected it without a model, prompts or --chat"
        )
    elif arguments.mesh is not None:
        raise RequestError("expected --mesh with a model; random weights are made on one device")


def _simulation(arguments: argparse.Namespace) -> Callable[[TreeConfig], float] | None:
    """Simulated accept length of each tree; None where acceptance is not simulated."""
    if arguments.random is None:
        return None
    length = arguments.accept_length
    return published_accept_length if length is None else lambda tree: min(length, float(tree.longest_path))


def _model(arguments: argparse.Namespace, cases: Sequence[TimingCase]) -> Model:
    """Load or make the model of the flags, after a check of the budgets.

    Raises:
        CheckpointError: the model cannot be loaded.
        RequestError: a budget does not fit the model, or random weights are too large or would be quantized.
    """
    budgets = [case.spec.budget for case in cases]
    if arguments.random is None:
        return load_requested(arguments, *budgets)
    shape = SHAPES[arguments.random]
    config, _ = shapes_of(shape, arguments.layers)
    for budget in budgets:
        check_budget(budget, config)
    if arguments.quantization is not None:
        raise RequestError("expected --quantization with a model; random weights have no quality to lose")
    check_memory(config, arguments.dtype)
    return random_model(shape, arguments.layers, arguments.dtype, backend_of(arguments))


def _prompts(arguments: argparse.Namespace, model: Model) -> dict[str, list[list[int]]]:
    if arguments.random is None:
        return prompt_sets(model, arguments)
    length = min(PIECE, arguments.longest_prompt)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (arguments.count, length))
    return {RANDOM_PROMPTS: ids.tolist()}


def _about(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Columns of every row that describe model and device."""
    simulated = arguments.random is not None
    draft = None if model.draft is None else model.draft.name
    shape = None if not simulated else SHAPES[arguments.random]
    return {
        "model": shape or shown_name(arguments.model),
        "draft_model": None if draft is None else shown_name(draft),
        "layers": model.config.num_hidden_layers, "num_experts": model.config.num_experts,
        "weights": "random" if simulated else "trained checkpoint",
        "simulated": simulated, "simulated_routing_skew": None if shape is None else EXPONENTS[shape],
        "device": device_name(), "mesh": model.programs.mesh_sizes, "dtype": model.precision,
        "backend": model.expert_form, "versions": versions(),
        "new_tokens": arguments.tokens, "repeats": arguments.repeats, "temperature": 0.0,
    }  # fmt: skip


def _requested(cases: Mapping[str, TimingCase], sets: Mapping[str, list[list[int]]]) -> dict[str, Any]:
    """Further inputs of the measurement: every case, and the prompts."""
    prompts = {name: digest(ids) for name, ids in sets.items()}
    return {"settings": {name: _recorded(case) for name, case in cases.items()}, "prompts": prompts}


def _recorded(case: TimingCase) -> str:
    """Describe a case in the form of version 0.1, so that older files turns.jsonl can be continued."""
    budget = case.spec.budget
    if budget is not None:
        coverage, anchor = budget.coverage, budget.anchor
        if (coverage, anchor) == ("substitute", "likely"):
            coverage, anchor = "guarantee", "none"
        rule = f"coverage={coverage!r}, score={budget.score!r}, credit={budget.credit!r}"
        rule += f", anchor={anchor!r}, size={budget.size!r}, mass={budget.mass!r}"
        rule += f", guarantee={budget.anchor_probability!r}, faithfulness={budget.min_kept_weight!r}"
        budget = f"BudgetConfig(experts={budget.experts!r}, {rule}, groups={budget.groups!r})"
    simulate = case.spec.simulate_accept_length
    return f"Setting(tree={case.spec.tree!r}, budget={budget}, batch={case.batch!r}, simulate={simulate!r})"


def _floor(model: Model, bandwidth: float) -> Callable[[float], float]:
    """Make a function from the number of experts that a layer reads to the least seconds of a pass (roofline)."""
    return lambda experts_read: verification_bytes(model.config, model.params, experts_read) / bandwidth


if __name__ == "__main__":
    sys.exit(main())
