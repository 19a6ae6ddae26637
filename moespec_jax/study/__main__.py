"""Study what routing, draft trees and expert budgets do on a model and prompts: `python -m moespec_jax.study`.

The figures of MoE-Spec's paper, for any model and sets of prompts: experts read by size of the tree, mass kept by size
of the budget, divergence and speed by rule and budget, what is lost of the experts' output, which experts go together,
acceptance by depth; and which rule is best, with intervals. One CSV and one picture each, and a page with all of them.
"""

import argparse
import hashlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moespec_jax.checkpoint.tokenizer import chat_prompt
from moespec_jax.cli.arguments import add_model_flags, add_tree_flags, load_requested, parse_budget, tree_of
from moespec_jax.cli.command import Parser, run_command, write_output
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.errors import RequestError
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import add_prompt_set_flags, check_prompt_sets, prompt_sets
from moespec_jax.runtime.load import DEMO_DRAFT, DEMO_TARGET
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions
from moespec_jax.study.measure import RECONSTRUCTED, Plan, measure
from moespec_jax.study.routing import check_studied
from moespec_jax.study.rules import FEW, RULES, TIMED, default_budgets, named_rules

EXAMPLE = """
examples:
  python -m moespec_jax.study
  python -m moespec_jax.study --model MODEL --draft-model HEAD --chat --prompts gsm8k=gsm8k.jsonl --output gsm8k
  python -m moespec_jax.study --rules all --budgets 6 8 12 16 24

Interrupted, it goes on where it was with the same command. More rules or budgets may be asked for with the same
--output: what has been measured is kept.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what the caller can fix, 130 when interrupted."""
    given = sys.argv[1:] if argv is None else argv
    return run_command(_parser(), lambda arguments: _run(arguments, given), argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m moespec_jax.study", description=__doc__, epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_flags(parser.add_argument_group("model"))
    add_tree_flags(parser.add_argument_group("tree (default: EAGLE's)"))
    group = parser.add_argument_group("prompts")
    add_prompt_set_flags(group, count=16)
    group.add_argument("--tokens", type=int, default=96, help="followed of each text after its prompt (96)")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompts")
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--rules", nargs="+", default=["few"], metavar="RULE", help="names of rules, few (default) or all; see below"
    )
    group.add_argument(
        "--budgets", nargs="+", metavar="B", help="experts a layer, or shares of them (0.1875 0.25 0.375 0.5)"
    )
    group.add_argument("--rounds", type=int, default=8, help="rounds after each prompt whose routing is recorded (8)")
    group.add_argument(
        "--batch", type=int, default=8, metavar="N", help="texts side by side: less takes less memory (8)"
    )
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--timed", nargs="+", metavar="RULE", help="rules to time: names, few or all (default: few; --rules if given)"
    )
    group.add_argument("--timed-budgets", nargs="+", metavar="B", help="(default: 0.25 0.5; --budgets if given)")
    group.add_argument("--timed-prompts", type=int, default=4, help="of each set; 0 times nothing (4)")
    group.add_argument("--timed-tokens", type=int, default=64, help="decoded of each (64)")
    group.add_argument("--repeats", type=int, default=3, help="turns (3)")
    parser.add_argument("--output", type=Path, default=Path("study"), metavar="DIR", help="what is written (study)")
    parser.epilog = f"{EXAMPLE}\nrules:\n" + "".join(f"  {name}\n" for name in RULES)
    return parser


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    _check(arguments)
    tree = tree_of(arguments) or TreeConfig()
    rules = named_rules(arguments.rules, FEW)
    model = load_requested(arguments)
    check_studied(model)
    plan = plan_of(arguments, model.config, tree, rules)
    as_chat = (lambda text: chat_prompt(model.directory, text, None, True)) if arguments.chat else None
    sets = prompt_sets(model, arguments, as_chat)
    _check_context(model, sets, plan)
    about = _about(model, arguments, plan)
    ledger = Ledger(arguments.output / "study.jsonl", about | _measured_on(sets, plan))
    measure(model, plan, sets, ledger)
    # matplotlib, which only pictures need, is asked for before anything is measured and loaded after.
    from moespec_jax.study.report import PAGE, write_report

    summary = write_report(model.config, plan, list(sets), ledger, about, command_line(given), arguments.output)
    write_output(f"{summary}\n{arguments.output / PAGE}\n")


def plan_of(arguments: argparse.Namespace, config: DecoderConfig, tree: TreeConfig, rules: list[str]) -> Plan:
    """What the flags ask to be measured.

    Raises:
        RequestError: a budget is not one that this model can have.
    """
    budgets = _counts(arguments.budgets, config) or default_budgets(config)
    chosen = arguments.rules != ["few"] or arguments.budgets is not None
    timed = named_rules(arguments.timed or arguments.rules, TIMED)
    some = sorted({max(config.num_experts_per_tok, config.num_experts // part) for part in (2, 4)} & set(budgets))
    timed_budgets = _counts(arguments.timed_budgets, config) or (some if some and not chosen else budgets)
    return Plan(
        tree, arguments.tokens, arguments.batch, arguments.rounds, rules, budgets, timed, timed_budgets,
        arguments.timed_prompts, arguments.timed_tokens, arguments.repeats,
    )  # fmt: skip


def _counts(given: Sequence[str] | None, config: DecoderConfig) -> list[int]:
    """Numbers of experts from numbers or shares of them, the smallest first."""
    counts = set()
    for text in given or []:
        experts = parse_budget(text)
        try:
            counts |= set(resolve(BudgetConfig(experts), config).experts)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise RequestError(str(error)) from None
    return sorted(counts)


def command_line(given: Sequence[str]) -> str:
    """The command with files and directories by their names: their places mean nothing on another machine."""
    words, skip = [], False
    for word in given:
        if skip or word in ("--output", "--compilation-cache"):
            skip = not skip
            continue
        name, equals, file = word.partition("=")
        path = Path(file if equals else word)
        shown = path.resolve().name if path.exists() else None
        words.append(word if shown is None else f"{name}={shown}" if equals else shown)
    return shlex.join(["python", "-m", "moespec_jax.study", *words])


def _check(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("expected matplotlib, which draws the figures: pip install moespec_jax[plots]")
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
            f"expected prompts and what is decoded after them to fit the model's context of"
            f" {model.config.context_length}; they need {needed}: see --longest-prompt, --tokens and --timed-tokens"
        )


def _about(model: Model, arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What every file of the study says of where its figures come from."""
    assert model.draft is not None
    device = jax.devices()[0]
    return {
        "model": _shown(arguments.model, DEMO_TARGET, "the embedded target"),
        "draft_model": _shown(model.draft.name, DEMO_DRAFT, "the embedded head"),
        "tree": plan.tree.name,
        "device": f"{device.platform} ({device.device_kind})",
        "dtype": model.precision,
        "jax": versions()["jax"],
        "moespec_jax": versions()["moespec_jax"],
    }


def _measured_on(sets: dict[str, list[list[int]]], plan: Plan) -> dict[str, Any]:
    """What pieces depend on besides their names."""
    prompts = {name: hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for name, ids in sets.items()}
    timed = {"timed_prompts": plan.timed_prompts, "timed_tokens": plan.timed_tokens}
    return {"prompts": prompts, "tokens": plan.tokens, "rounds": plan.rounds, "batch": plan.batch} | timed


def _shown(name: str, embedded: str, called: str) -> str:
    """A hub id as it is; of a directory its name, for its place means nothing on another machine."""
    if name == embedded:
        return called
    return Path(name).resolve().name if Path(name).exists() else name


if __name__ == "__main__":
    sys.exit(main())
