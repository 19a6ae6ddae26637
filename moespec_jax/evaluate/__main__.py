"""What does a budget cost in quality? `python -m moespec_jax.evaluate`

Follows texts token by token through verifying passes, exactly and under expert budgets, and says how far the
distribution is from the exact target's, how often the first choice is the same, and how likely the text is. With
--answers, questions are answered plainly, by exact speculation and under the budgets, and the answers are checked.
Without arguments: held-out modules, the embedded pair, budgets of a quarter and of half of the experts.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moespec_jax.checkpoint.tokenizer import chat_prompt
from moespec_jax.cli.arguments import (
    add_model_flags,
    add_profile_flag,
    add_rule_flags,
    add_tree_flags,
    load_requested,
    parse_budget,
    rule_of,
    shown_name,
    tree_of,
)
from moespec_jax.cli.command import Parser, run_command, write_output
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.accuracy import answer
from moespec_jax.evaluate.answers import Question, read_questions
from moespec_jax.evaluate.divergence import measure
from moespec_jax.evaluate.report import report
from moespec_jax.evaluate.rows import answer_rows, text_rows
from moespec_jax.evaluate.specs import EvaluatedSpec, evaluated_spec
from moespec_jax.evaluate.texts import TextSet, add_text_flags, own_sets, prompts_to_continue, text_files, written_sets
from moespec_jax.files import write_text
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import add_prompt_set_flags, check_prompt_sets
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import device_name, versions
from moespec_jax.runtime.tuned_profile import read_profile

EXAMPLE = """
examples:
  python -m moespec_jax.evaluate
  python -m moespec_jax.evaluate --model MODEL --draft-model HEAD --chat --prompts mine=prompts.jsonl \\
      --tree-size 60 --tree-depth 7 --tree-top-k 10 --expert-budget 32 --expert-budget 48
  python -m moespec_jax.evaluate --model MODEL --draft-model HEAD --chat --answers gsm8k.jsonl --profile profile.json

Interrupted, it goes on with what is missing, with the same command. For other tasks: docs/evaluate.md, lm-eval.
"""
COUNT, TOKENS, ANSWER_TOKENS, BATCH = 16, 96, 256, 16


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for what the caller can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m moespec_jax.evaluate", description=__doc__, epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("what is compared with plain decoding")
    add_tree_flags(group)
    group.add_argument(
        "--expert-budget", action="append", metavar="B",
        help="experts a layer may read in a verification: a number, a fraction of all, or one for each sparse layer"
        " between commas; none: exact speculation only; repeatable (default: a quarter and half of the experts)",
    )  # fmt: skip
    add_rule_flags(group)
    add_profile_flag(group)
    group = parser.add_argument_group("texts, which are followed token by token")
    add_prompt_set_flags(group, count=COUNT)
    add_text_flags(group, tokens=TOKENS)
    group = parser.add_argument_group("questions, whose answers are checked")
    group.add_argument(
        "--answers", type=Path, action="append", default=[], metavar="FILE",
        help="JSON lines with turns and reference, all of them or the first --count; the last number of an answer must"
        " be the reference's; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--run-code", action="store_true",
        help="run answers that are code, each in a process with limits of time and memory, which may still read what"
        " you may read: they must pass test, or the examples in the prompt",
    )  # fmt: skip
    group.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS, help=f"most of an answer ({ANSWER_TOKENS})")
    group = parser.add_argument_group("prompts and questions")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to them")
    group.add_argument("--no-thinking", action="store_true", help="ask the template for answers without thinking")
    group.add_argument("--batch", type=int, default=BATCH, help=f"texts or questions at a time ({BATCH})")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("evaluate"), metavar="DIR",
        help="gets evaluate.jsonl, evaluate.md, evaluate.png, and pieces.jsonl, what was measured (evaluate)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the rows of evaluate.jsonl instead of the tables")
    parser.set_defaults(count=None)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    most = arguments.count
    arguments.count = COUNT if most is None else most
    _check(arguments)
    tree, budgets = _requested_specs(arguments)
    questions, left_out = _questions(arguments, most)
    model = load_requested(arguments, *(budgets or ()))
    specs = _specs(model, tree, budgets, rule_of(arguments))
    drafts = len(specs) > 1
    written = written_sets(model, arguments) if drafts else []
    prompts = prompts_to_continue(model, arguments, _as_chat(model, arguments)) if drafts else {}
    if not (written or prompts or questions):
        raise RequestError("expected a draft head, whose trees are verified, or --answers; there is neither")
    about, batch = _about(model, arguments), arguments.batch
    ledger = Ledger(
        arguments.output / "pieces.jsonl", about | _measured_on(arguments, specs, written, prompts, questions)
    )
    texts = [*written, *own_sets(model, prompts, arguments.tokens, batch, ledger)]
    measure(model, texts, specs, batch, ledger)
    answer(model, questions, specs, _as_prompt(model, arguments), arguments.answer_tokens, batch, ledger)
    rows = text_rows(model, texts, specs, ledger) + answer_rows(questions, left_out, specs, batch, ledger)
    _write([about | row for row in rows], arguments)


def _write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    # matplotlib, which only the picture needs, is asked for before anything is measured and loaded after.
    from moespec_jax.evaluate.chart import write_chart

    lines, text = "".join(json.dumps(row) + "\n" for row in rows), report(rows)
    write_text(arguments.output / "evaluate.jsonl", lines)
    write_text(arguments.output / "evaluate.md", text)
    write_chart(rows, arguments.output / "evaluate.png")
    write_output(lines if arguments.json else text)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("expected matplotlib, which draws the figure: pip install moespec_jax[plots]")
    for name in ("tokens", "answer_tokens", "batch"):
        if getattr(arguments, name) < 1:
            raise RequestError(f"expected --{name.replace('_', '-')} of at least 1; got {getattr(arguments, name)}")
    if arguments.run_code and not arguments.answers:
        raise RequestError("--run-code is about answers; expected --answers with it")
    if arguments.no_thinking and not arguments.chat:
        raise RequestError("--no-thinking is part of a chat; expected --chat with it")
    stems = [path.stem for path in arguments.answers]
    if len(set(stems)) < len(stems):
        raise RequestError(f"expected --answers files of different names; got {', '.join(stems)}")
    check_prompt_sets(arguments)
    text_files(arguments)


def _requested_specs(
    arguments: argparse.Namespace,
) -> tuple[TreeConfig | Literal["default"] | None, list[BudgetConfig] | None]:
    """Tree and budgets of the flags or the profile; None stands for default budgets.

    Raises:
        RequestError: there are no such tree and budgets, or both a profile and flags ask for them.
    """
    tree, rule, given = tree_of(arguments), rule_of(arguments), arguments.expert_budget
    if arguments.profile is not None:
        if tree is not None or rule or given:
            raise RequestError("expected a tree and a budget either from --profile or from flags; got both")
        found = read_profile(arguments.profile)
        return found["tree"], [] if found["budget"] is None else [found["budget"]]
    if given is None:
        return tree or "default", None
    try:
        budgets = [BudgetConfig(parse_budget(text), **rule) for text in given if text != "none"]  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise RequestError(str(error)) from None
    return tree or "default", list(dict.fromkeys(budgets))


def _questions(
    arguments: argparse.Namespace, most: int | None
) -> tuple[dict[str, list[Question]], dict[str, dict[str, int]]]:
    """Questions by the names of their files, and how many were left out, by reason."""
    found = {path.stem: read_questions(path, arguments.run_code, most) for path in arguments.answers}
    return {name: asked for name, (asked, _) in found.items()}, {name: left for name, (_, left) in found.items()}


def _specs(
    model: Model,
    tree: TreeConfig | Literal["default"] | None,
    budgets: list[BudgetConfig] | None,
    rule: dict[str, Any],
) -> list[EvaluatedSpec]:
    """List plain decoding, and with a draft head exact speculation and every budget."""
    specs = [evaluated_spec(model, DecodingSpec())]
    if tree is None or model.draft is None:
        if budgets or rule:  # refused with the reason
            evaluated_spec(model, DecodingSpec(budget=(budgets or [BudgetConfig(1)])[0]))
        return specs
    total, least = model.config.num_experts, model.config.num_experts_per_tok
    if budgets is None:
        counts = dict.fromkeys(max(total // part, least) for part in (4, 2)) if model.config.num_sparse_layers else ()
        budgets = [BudgetConfig(count, **rule) for count in counts]
    return specs + [evaluated_spec(model, DecodingSpec(tree, budget)) for budget in (None, *budgets)]


def _as_chat(model: Model, arguments: argparse.Namespace) -> Callable[[str], str] | None:
    thinking = not arguments.no_thinking
    return (lambda text: chat_prompt(model.directory, text, None, thinking)) if arguments.chat else None


def _as_prompt(model: Model, arguments: argparse.Namespace) -> Callable[[str], list[int]]:
    """Token ids of a question; a chat template writes the special tokens itself."""
    as_chat = _as_chat(model, arguments)
    return lambda text: model.encode(text if as_chat is None else as_chat(text), special_tokens=as_chat is None)


def _about(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """What every row says of where its figures come from."""
    draft = model.draft
    return {
        "model": shown_name(arguments.model),
        "draft_model": None if draft is None else shown_name(draft.name),
        "num_experts": model.config.num_experts, "num_experts_per_tok": model.config.num_experts_per_tok,
        "device": device_name(), "dtype": model.precision,
        "backend": model.backend.name, "versions": versions(), "chat": arguments.chat, "temperature": 0.0,
    }  # fmt: skip


def _measured_on(
    arguments: argparse.Namespace,
    specs: Sequence[EvaluatedSpec],
    written: Sequence[TextSet],
    prompts: Mapping[str, list[list[int]]],
    questions: Mapping[str, list[Question]],
) -> dict[str, Any]:
    """Further inputs of the measurement."""
    numbers = {name: getattr(arguments, name) for name in ("tokens", "answer_tokens", "batch")}
    sets = {f"{s.name}, {s.kind}": _hash([s.texts, s.given]) for s in written}
    sets |= {name: _hash(ids) for name, ids in prompts.items()}
    asked = {f"{name}, answered": _hash([repr(q) for q in of]) for name, of in questions.items()}
    return numbers | {"ways": {evaluated.name: evaluated.columns() for evaluated in specs}, "sets": sets | asked}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
