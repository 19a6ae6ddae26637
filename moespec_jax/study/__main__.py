"""Measure routing, draft trees and expert budgets on a model and prompts: `python -m moespec_jax.study`.

Makes the figures of MoE-Spec's paper (arXiv:2602.16052) for any model with experts and a draft head, and any sets of
prompts: distinct experts by tree size; router probability kept by budget; divergence from the exact model, acceptance
and speed by rule and budget; error of the experts' output; experts selected together; acceptance by depth. Compares the
budget rules on the same texts, with confidence intervals. Prints the comparison, and writes a CSV file and a picture
for each figure, and study.html with all of them.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moespec_jax.checkpoint.head.read import LoadedBlockDraft
from moespec_jax.cli.arguments import (
    add_mesh_flag,
    add_model_flags,
    add_tree_flags,
    load_requested,
    shown_name,
    tree_of,
)
from moespec_jax.cli.budget_flags import parse_budget
from moespec_jax.cli.command import command_parser, require_matplotlib, run_command, write_tables
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.errors import RequestError
from moespec_jax.files import expanded
from moespec_jax.measure.ledger import Ledger, digest
from moespec_jax.measure.prompt_sets import add_prompt_set_flags, check_prompt_sets, prompt_sets
from moespec_jax.runtime.drafters import Draft, default_tree
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import device_name, devices_text, versions
from moespec_jax.study.measure import RECONSTRUCTED, Plan, measure
from moespec_jax.study.routing import check_studied
from moespec_jax.study.rules import FEW, RULES, TIMED, default_budgets, named_rules

EXAMPLE = """
examples:
  python -m moespec_jax.study
  python -m moespec_jax.study --model MODEL --draft-model HEAD --chat --prompts gsm8k=gsm8k.jsonl --output gsm8k
  python -m moespec_jax.study --rules all --budgets 6 8 12 16 24

The same command continues an interrupted study. Rules and budgets can be added later with the same --output: finished
measurements are kept.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    given = sys.argv[1:] if argv is None else argv
    return run_command(_parser(), lambda arguments: _run(arguments, given), argv)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("study", __doc__, EXAMPLE)
    add_model_flags(group := parser.add_argument_group("model"))
    add_mesh_flag(group)
    add_tree_flags(parser.add_argument_group("tree (default: 60/7/10, or a DFlash or DSpark head's block)"))
    group = parser.add_argument_group("prompts")
    add_prompt_set_flags(group, count=16)
    group.add_argument(
        "--tokens", type=int, default=96, metavar="N", help="tokens after each prompt that are measured (default: 96)"
    )
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompts")
    group = parser.add_argument_group("comparison of budget rules")
    group.add_argument(
        "--rules",
        nargs="+",
        default=["few"],
        metavar="RULE",
        help="names of the list below, few (default) or all; MoE-Spec's own rule is always included",
    )
    group.add_argument(
        "--budgets",
        nargs="+",
        metavar="B",
        help="numbers of experts that a layer may read, or fractions of all (default: 0.1875 0.25 0.375 0.5)",
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=8,
        metavar="N",
        help="rounds after each prompt whose routing is recorded (default: 8)",
    )
    group.add_argument(
        "--batch", type=int, default=8, metavar="N", help="texts that run at once; fewer need less memory (default: 8)"
    )
    _add_timing_flags(parser.add_argument_group("timing"))
    parser.add_argument(
        "--output", type=Path, default=Path("study"), metavar="DIR", help="directory of the results (default: study)"
    )
    parser.epilog = f"{EXAMPLE}\nrules (see docs/budgets.md):\n" + "".join(f"  {name}\n" for name in RULES)
    return parser


def _add_timing_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timed", nargs="+", metavar="RULE", help="rules to time: names, few or all (default: few; --rules if given)"
    )
    group.add_argument(
        "--timed-budgets",
        nargs="+",
        metavar="B",
        help="budgets to time (default: 0.25 0.5; all budgets if --rules or --budgets is given)",
    )
    group.add_argument(
        "--timed-prompts",
        type=int,
        default=4,
        metavar="N",
        help="prompts of each set that are timed; 0 skips the timing (default: 4)",
    )
    group.add_argument(
        "--timed-tokens", type=int, default=64, metavar="N", help="new tokens of each timed prompt (default: 64)"
    )
    group.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="turns, each of which decodes every case once (default: 3)"
    )


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    _check(arguments)
    tree, rules = tree_of(arguments), named_rules(arguments.rules, FEW)
    model = load_requested(arguments)
    check_studied(model)
    plan = plan_of(arguments, model.config, tree or studied_tree(model.draft), rules)
    sets = prompt_sets(model, arguments)
    _check_context(model, sets, plan)
    about = _about(model, arguments, plan)
    ledger = Ledger(arguments.output / "study.jsonl", about | _measured_on(sets, plan))
    measure(model, plan, sets, ledger)
    # Imported after the measurements: only the pictures need matplotlib.
    from moespec_jax.study.report import PAGE, write_report

    summary = write_report(model.config, plan, list(sets), ledger, about, command_line(given), arguments.output)
    write_tables(f"{summary}\n{arguments.output / PAGE}\n")


def studied_tree(draft: Draft | None) -> TreeConfig:
    """Choose the tree where none is given: EAGLE's, or the whole block of a head that drafts no trees."""
    return default_tree(draft) if isinstance(draft, LoadedBlockDraft) else TreeConfig()


def plan_of(arguments: argparse.Namespace, config: DecoderConfig, tree: TreeConfig, rules: list[str]) -> Plan:
    """Build the plan of the flags.

    Raises:
        RequestError: the model cannot have a budget.
    """
    budgets = _counts(arguments.budgets, config) or default_budgets(config)
    by_default = arguments.rules == ["few"] and arguments.budgets is None
    timed = named_rules(arguments.timed or arguments.rules, TIMED)
    some = sorted({max(config.num_experts_per_tok, config.num_experts // part) for part in (2, 4)} & set(budgets))
    timed_budgets = _counts(arguments.timed_budgets, config) or (some if some and by_default else budgets)
    return Plan(
        tree, arguments.tokens, arguments.batch, arguments.rounds, rules, budgets, timed, timed_budgets,
        arguments.timed_prompts, arguments.timed_tokens, arguments.repeats,
    )  # fmt: skip


def _counts(given: Sequence[str] | None, config: DecoderConfig) -> list[int]:
    """Parse numbers or fractions of the experts; returns the distinct numbers, the smallest first."""
    counts = set()
    for text in given or []:
        experts = parse_budget(text)
        try:
            counts |= set(resolve(BudgetConfig(experts), config).experts)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise RequestError(str(error)) from None
    return sorted(counts)


def command_line(given: Sequence[str]) -> str:
    """Quote the command without the output directory, and with the names of files and directories in place of their
    paths, which differ between machines."""
    words, skip = [], False
    for word in given:
        if skip or word in ("--output", "--compilation-cache"):
            skip = not skip
            continue
        name, equals, file = word.partition("=")
        path = expanded(file if equals else word)
        shown = path.resolve().name if path.exists() else None
        words.append(word if shown is None else f"{name}={shown}" if equals else shown)
    return shlex.join(["python", "-m", "moespec_jax.study", *words])


def _check(arguments: argparse.Namespace) -> None:
    require_matplotlib()
    for name, least in {
        "tokens": 2,
        "batch": 1,
        "rounds": RECONSTRUCTED,
        "timed_prompts": 0,
        "timed_tokens": 2,
    }.items():
        if getattr(arguments, name) < least:
            flag = name.replace("_", "-")
            raise RequestError(f"expected --{flag} of at least {least}; got {getattr(arguments, name)}")
    if arguments.repeats < 1:
        raise RequestError(f"expected --repeats of at least 1; got {arguments.repeats}")
    named_rules(arguments.timed or [], TIMED)
    check_prompt_sets(arguments)


def _check_context(model: Model, sets: dict[str, list[list[int]]], plan: Plan) -> None:
    longest = max(len(prompt) for prompts in sets.values() for prompt in prompts)
    needed = longest + max(plan.tokens + 1, plan.timed_tokens)
    if needed > model.config.context_length:
        raise RequestError(
            f"expected prompts and the tokens after them to fit the model's context of"
            f" {model.config.context_length}; they need {needed}: see --longest-prompt, --tokens and --timed-tokens"
        )


def _about(model: Model, arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Origin of the results, which every file of the study contains."""
    assert model.draft is not None
    return {
        "model": shown_name(arguments.model),
        "draft_model": shown_name(model.draft.name),
        "tree": plan.tree.name,
        "device": devices_text(device_name(), model.programs.mesh_sizes),
        "dtype": model.precision,
        "jax": versions()["jax"],
        "moespec_jax": versions()["moespec_jax"],
    }


def _measured_on(sets: dict[str, list[list[int]]], plan: Plan) -> dict[str, Any]:
    """Settings that the values of tasks depend on, besides those in the tasks' names."""
    prompts = {name: digest(ids) for name, ids in sets.items()}
    timed = {"timed_prompts": plan.timed_prompts, "timed_tokens": plan.timed_tokens}
    return {"prompts": prompts, "tokens": plan.tokens, "rounds": plan.rounds, "batch": plan.batch} | timed


if __name__ == "__main__":
    sys.exit(main())
