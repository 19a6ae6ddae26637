"""Is speculation worth it on this model and device? `python -m moespec_jax.bench`

Times plain decoding, chains and trees without a budget (exact) and under expert budgets (lossy), taking turns in one
process, warmed up, on given prompts. Says how fast each is, also against plain decoding, the same tree without a
budget, and the best exact setting; what was accepted, wanted and read; and how near to the memory's speed it comes.
With --random, shapes of published models without a download: random weights, simulated acceptance and routing.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moespec_jax.bench.random_pair import EXPONENTS, check_memory, published_accept_length, random_model, shapes_of
from moespec_jax.bench.rows import result_rows
from moespec_jax.bench.sweep import add_sweep_flags, check_sweep, sweep
from moespec_jax.bench.table import report
from moespec_jax.bench.verification import decode_and_verify
from moespec_jax.checkpoint.tokenizer import chat_prompt
from moespec_jax.cli.arguments import add_model_flags, check_budget, load_requested, shown_name
from moespec_jax.cli.command import Parser, run_command, write_output
from moespec_jax.config import TreeConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import write_text
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import PIECE, add_prompt_set_flags, check_prompt_sets, prompt_sets
from moespec_jax.measure.roofline import copy_bandwidth, verification_bytes
from moespec_jax.measure.timing import TimingCase, time_interleaved
from moespec_jax.runtime.load import DEMO_TARGET
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions

EXAMPLE = """
examples:
  python -m moespec_jax.bench
  python -m moespec_jax.bench --model MODEL --draft-model HEAD --chat --prompts mine=prompts.jsonl \\
      --config-list 1,0,0,0 1,3,1,4 1,8,10,60 --budgets 0.5 0.25
  python -m moespec_jax.bench --random qwen3-30b-a3b --trees 4/2/1 60/7/10 --budgets 32 16 --output qwen3

Interrupted, it goes on with the turns that are missing, with the same command.
"""
# A name on the command line, and the published model of that shape.
SHAPES = {name.lower(): name for name in EXPONENTS}
RANDOM_PROMPTS = "random tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what the caller can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m moespec_jax.bench", description=__doc__, epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("or a shape with random weights, which says nothing of any text")
    group.add_argument("--random", choices=list(SHAPES), help="simulates acceptance and the routers' preferences")
    group.add_argument("--layers", type=int, metavar="N", help="so many layers only, where the model does not fit")
    group.add_argument(
        "--accept-length",
        type=float,
        metavar="X",
        help="tokens a round to simulate for every tree (default: from 2.3 at 5 nodes to 3.7 at 60)",
    )
    add_sweep_flags(parser.add_argument_group("what is compared"))
    group = parser.add_argument_group("prompts")
    add_prompt_set_flags(group, count=8)
    group.add_argument("--tokens", type=int, default=64, help="new tokens a prompt (64)")
    group.add_argument("--repeats", type=int, default=5, help="turns (5)")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompts")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("bench"), metavar="DIR",
        help="gets bench.jsonl, a row a setting, bench.md, bench.png and turns.jsonl, what was measured (bench)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the rows of bench.jsonl instead of the table")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    cases = sweep(arguments, _simulation(arguments))
    model = _model(arguments, list(cases.values()))
    sets = _prompts(arguments, model)
    for prompts in sets.values():
        check_sweep(list(cases.values()), model, len(prompts))
    about = _about(model, arguments)
    file = arguments.output / "turns.jsonl"
    ledger = Ledger(file, about | _requested(cases, sets))
    if len(ledger) == 1 + arguments.repeats * len(cases) * len(sets):
        print(f"{file} has all turns, and nothing is measured; remove it to measure anew", file=sys.stderr)
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
    # matplotlib, which only the picture needs, is asked for before anything is measured and loaded after.
    from moespec_jax.bench.chart import write_chart

    lines, text = "".join(json.dumps(row) + "\n" for row in rows), report(rows)
    write_text(arguments.output / "bench.jsonl", lines)
    write_text(arguments.output / "bench.md", text)
    write_chart(rows, arguments.output / "bench.png")
    write_output(lines if arguments.json else text)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is loaded."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("expected matplotlib, which draws the figure: pip install moespec_jax[plots]")
    for name, least in {"tokens": 2, "repeats": 1}.items():
        if getattr(arguments, name) < least:
            raise RequestError(f"expected --{name} of at least {least}; got {getattr(arguments, name)}")
    length = arguments.accept_length
    if length is not None and not 1.0 <= length < float("inf"):
        raise RequestError(f"expected --accept-length of at least 1, what every round gives; got {length}")
    check_prompt_sets(arguments)
    if arguments.random is None:
        for flag in ("layers", "accept_length"):
            if getattr(arguments, flag) is not None:
                raise RequestError(f"--{flag.replace('_', '-')} is about random weights; expected --random with it")
    elif arguments.prompts or arguments.chat or arguments.draft_model or arguments.model != DEMO_TARGET:
        raise RequestError("--random has no text and a head of its own; expected it without a model, prompts or --chat")


def _simulation(arguments: argparse.Namespace) -> Callable[[TreeConfig], float] | None:
    """How many tokens a round of a tree is made to accept; None where acceptance is the model's own."""
    if arguments.random is None:
        return None
    given = arguments.accept_length
    return published_accept_length if given is None else lambda tree: min(given, float(tree.longest_path))


def _model(arguments: argparse.Namespace, cases: Sequence[TimingCase]) -> Model:
    """The model that is asked for, if it can have the budgets."""
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
    return random_model(shape, arguments.layers, arguments.dtype)


def _prompts(arguments: argparse.Namespace, model: Model) -> dict[str, list[list[int]]]:
    if arguments.random is None:
        as_chat = (lambda text: chat_prompt(model.directory, text, None, True)) if arguments.chat else None
        return prompt_sets(model, arguments, as_chat)
    length = min(PIECE, arguments.longest_prompt)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (arguments.count, length))
    return {RANDOM_PROMPTS: ids.tolist()}


def _about(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """What every row says of where its figures come from."""
    device, simulated = jax.devices()[0], arguments.random is not None
    draft = None if model.draft is None else model.draft.name
    shape = None if not simulated else SHAPES[arguments.random]
    return {
        "model": shape or shown_name(arguments.model),
        "draft_model": None if draft is None else shown_name(draft),
        "layers": model.config.num_hidden_layers, "num_experts": model.config.num_experts,
        "weights": "random" if simulated else "trained checkpoint",
        "simulated": simulated, "simulated_routing_skew": None if shape is None else EXPONENTS[shape],
        "device": f"{device.platform} ({device.device_kind})", "dtype": model.precision,
        "backend": model.backend.name, "versions": versions(),
        "new_tokens": arguments.tokens, "repeats": arguments.repeats, "temperature": 0.0,
    }  # fmt: skip


def _requested(cases: Mapping[str, TimingCase], sets: Mapping[str, list[list[int]]]) -> dict[str, Any]:
    """Further inputs of the measurement: every case, and the prompts."""
    prompts = {name: hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for name, ids in sets.items()}
    return {"settings": {name: _recorded(case) for name, case in cases.items()}, "prompts": prompts}


def _recorded(case: TimingCase) -> str:
    """A case as turns.jsonl has recorded it since 0.1: a file that was begun before is continued."""
    budget = case.spec.budget
    if budget is not None:
        coverage, anchor = ("guarantee", "none") if budget.anchor == "likely" else (budget.coverage, budget.anchor)
        rule = f"coverage={coverage!r}, score={budget.score!r}, credit={budget.credit!r}"
        rule += f", anchor={anchor!r}, size={budget.size!r}, mass={budget.mass!r}"
        rule += f", guarantee={budget.anchor_probability!r}, faithfulness={budget.min_kept_weight!r}"
        budget = f"BudgetConfig(experts={budget.experts!r}, {rule}, groups={budget.groups!r})"
    simulate = case.spec.simulate_accept_length
    return f"Setting(tree={case.spec.tree!r}, budget={budget}, batch={case.batch!r}, simulate={simulate!r})"


def _floor(model: Model, bandwidth: float) -> Callable[[float], float]:
    """Seconds that a pass takes at the least which reads so many experts a layer, at the speed of a copy."""
    return lambda experts: verification_bytes(model.config, model.params, experts) / bandwidth


if __name__ == "__main__":
    sys.exit(main())
