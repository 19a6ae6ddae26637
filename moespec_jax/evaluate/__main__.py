"""Measure the quality that an expert budget costs.

Teacher-forces texts through verifications, exactly and under expert budgets,
and reports the divergence (KL) from the exact target's distribution of the next
token, the share of positions with the same most probable token, and the
perplexity. With --also-load, the same for the target loaded a second way: with
int8 experts, in another dtype, or from a quantized checkpoint. With --answers,
also answers questions by plain decoding, by exact speculation and under the
budgets, and checks the answers.

Without arguments: the embedded pair on held-out Python modules, with budgets of
a quarter and of half of the experts.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moespec_jax.cli.arguments import (
    add_mesh_flag,
    add_model_flags,
    add_profile_flag,
    add_tree_flags,
    load_requested,
    max_kl_of,
    shown_name,
    tree_of,
)
from moespec_jax.cli.budget_flags import add_rule_flags, parse_budget, rule_of
from moespec_jax.cli.command import command_parser, require_matplotlib, run_command, write_tables
from moespec_jax.cli.prompts import encode_prompt
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.accuracy import answer
from moespec_jax.evaluate.answers import Question, read_questions
from moespec_jax.evaluate.divergence import measure
from moespec_jax.evaluate.report import report
from moespec_jax.evaluate.rows import answer_rows, text_rows
from moespec_jax.evaluate.second_loading import (
    add_second_flag,
    check_checkpoints,
    compare,
    second_loadings,
    second_rows,
)
from moespec_jax.evaluate.specs import EvaluatedSpec, evaluated_spec
from moespec_jax.evaluate.texts import TextSet, add_text_flags, own_sets, prompts_to_continue, text_files, written_sets
from moespec_jax.files import json_line, write_text
from moespec_jax.measure.ledger import Ledger, digest
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
  python -m moespec_jax.evaluate --model MODEL --draft-model none --also-load int8 --texts mine=texts.txt

After an interruption, the same command continues with the tasks that are
missing. To run tasks of lm-evaluation-harness, see docs/evaluate.md.
"""
COUNT, TOKENS, ANSWER_TOKENS, BATCH = 16, 96, 256, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__, EXAMPLE)
    add_model_flags(group := parser.add_argument_group("model"))
    add_mesh_flag(group)
    add_second_flag(group)
    group = parser.add_argument_group("tree and budgets (default tree: that of moespec_jax.generate)")
    add_tree_flags(group)
    group.add_argument(
        "--expert-budget", action="append", metavar="B",
        help="largest number of experts that a layer reads in a verification: a number, a fraction of all experts, or"
        " one of these for each sparse layer between commas; none: exact speculation only; repeatable (default: a"
        " quarter and half of the experts)",
    )  # fmt: skip
    add_rule_flags(group)
    add_profile_flag(group)
    group = parser.add_argument_group("texts for teacher forcing")
    add_prompt_set_flags(group, count=COUNT)
    add_text_flags(group, tokens=TOKENS)
    group = parser.add_argument_group("questions with known answers")
    group.add_argument(
        "--answers", type=Path, action="append", default=[], metavar="FILE",
        help="JSON lines with turns (the first is the question) or messages, and reference; the last number of an"
        " answer must equal that of the reference; all lines, or the first --count if it is given; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--run-code", action="store_true",
        help="run answers that are code: they must pass the line's test, or the examples in the prompt; each runs in a"
        " process with limits of time and memory, which is no sandbox: it can read your files",
    )  # fmt: skip
    group.add_argument(
        "--answer-tokens", type=int, default=ANSWER_TOKENS, metavar="N",
        help=f"largest length of an answer (default: {ANSWER_TOKENS})",
    )  # fmt: skip
    group = parser.add_argument_group("prompts and questions")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to prompts and questions")
    group.add_argument(
        "--no-thinking", action="store_true", help="render the chat template with enable_thinking set to false"
    )
    group.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"batch size (default: {BATCH})")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("evaluate"), metavar="DIR",
        help="directory of the results: evaluate.jsonl (a row for each setting and set), evaluate.md, evaluate.png, and"
        " pieces.jsonl (all measurements, from which an interrupted command continues) (default: evaluate)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the rows of evaluate.jsonl instead of the tables")
    parser.set_defaults(count=None)  # to distinguish a --count that is given, which also limits --answers
    return parser


def _run(arguments: argparse.Namespace) -> None:
    limit = arguments.count
    arguments.count = COUNT if limit is None else limit
    _check(arguments)
    tree, budgets = _requested_specs(arguments)
    seconds = second_loadings(arguments)
    questions, left_out = _questions(arguments, limit)
    model = load_requested(arguments, *(budgets or ()))
    specs = _specs(model, tree, budgets, rule_of(arguments))
    reads_texts = len(specs) > 1 or bool(seconds)
    written = written_sets(model, arguments) if reads_texts else []
    prompts = prompts_to_continue(model, arguments) if reads_texts else {}
    if not (written or prompts or questions):
        raise RequestError("expected a draft head for teacher forcing, --also-load or --answers; there is none of them")
    check_checkpoints(model, arguments, seconds, _longest(written, prompts, arguments.tokens))
    about, batch = _about(model, arguments), arguments.batch
    ledger = Ledger(
        arguments.output / "pieces.jsonl", about | _measured_on(arguments, specs, written, prompts, questions)
    )
    texts = [*written, *own_sets(model, prompts, arguments.tokens, batch, ledger)]
    measure(model, texts, specs, batch, ledger)
    answer(model, questions, specs, _as_prompt(model, arguments), arguments.answer_tokens, batch, ledger)
    compare(model, arguments, seconds, texts, ledger)
    rows = text_rows(model, texts, specs, ledger) + second_rows(model, seconds, texts, ledger)
    rows += answer_rows(questions, left_out, specs, batch, ledger)
    _write([about | row for row in rows], arguments)


def _write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    # Only the figure needs matplotlib, which takes long to import: `_check` finds it, this imports it.
    from moespec_jax.evaluate.chart import write_chart

    lines, text = "".join(map(json_line, rows)), report(rows)
    write_text(arguments.output / "evaluate.jsonl", lines)
    write_text(arguments.output / "evaluate.md", text)
    write_chart(rows, arguments.output / "evaluate.png")
    write_tables(lines if arguments.json else text)


def _check(arguments: argparse.Namespace) -> None:
    """Check the flags, before a model is loaded."""
    require_matplotlib()
    for name in ("tokens", "answer_tokens", "batch"):
        if getattr(arguments, name) < 1:
            raise RequestError(f"expected --{name.replace('_', '-')} of at least 1; got {getattr(arguments, name)}")
    if arguments.run_code and not arguments.answers:
        raise RequestError("--run-code applies to answers; expected --answers with it")
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
    """Read tree and budgets of the flags or the profile; None means the default budgets.

    Raises:
        RequestError: tree or budgets are invalid, or there are both a profile and flags.
    """
    tree, rule, texts = tree_of(arguments), rule_of(arguments), arguments.expert_budget
    max_kl = max_kl_of(arguments)
    if arguments.profile is not None:
        if tree is not None or rule or texts:
            raise RequestError("expected a tree and a budget either from --profile or from flags; got both")
        profile = read_profile(arguments.profile, max_kl=max_kl)
        return profile["tree"], [] if profile["budget"] is None else [profile["budget"]]
    if texts is None:
        return tree or "default", None
    try:
        budgets = [BudgetConfig(parse_budget(text), **rule) for text in texts if text != "none"]  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise RequestError(str(error)) from None
    return tree or "default", list(dict.fromkeys(budgets))


def _questions(
    arguments: argparse.Namespace, limit: int | None
) -> tuple[dict[str, list[Question]], dict[str, dict[str, int]]]:
    """Read the questions of each file, by its name; also the number of lines that were left out, by reason."""
    files = {path.stem: read_questions(path, arguments.run_code, limit) for path in arguments.answers}
    questions = {name: kept for name, (kept, _) in files.items()}
    return questions, {name: left_out for name, (_, left_out) in files.items()}


def _specs(
    model: Model,
    tree: TreeConfig | Literal["default"] | None,
    budgets: list[BudgetConfig] | None,
    rule: dict[str, Any],
) -> list[EvaluatedSpec]:
    """List plain decoding and, with a draft head, exact speculation and speculation under every budget."""
    specs = [evaluated_spec(model, DecodingSpec())]
    if tree is None or model.draft is None:
        if budgets or rule:  # raises an error with the reason
            evaluated_spec(model, DecodingSpec(budget=(budgets or [BudgetConfig(1)])[0]))
        return specs
    total, least = model.config.num_experts, model.config.num_experts_per_tok
    if budgets is None:
        counts = dict.fromkeys(max(total // part, least) for part in (4, 2)) if model.config.num_sparse_layers else ()
        budgets = [BudgetConfig(count, **rule) for count in counts]
    return specs + [evaluated_spec(model, DecodingSpec(tree, budget)) for budget in (None, *budgets)]


def _as_prompt(model: Model, arguments: argparse.Namespace) -> Callable[[Question], list[int]]:
    """Make a function from a question to token ids."""
    thinking = not arguments.no_thinking
    return lambda question: encode_prompt(model, question.as_prompt(), chat=arguments.chat, thinking=thinking)


def _about(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Columns of every row that describe model and device."""
    draft = model.draft
    return {
        "model": shown_name(arguments.model),
        "draft_model": None if draft is None else shown_name(draft.name),
        "num_experts": model.config.num_experts, "num_experts_per_tok": model.config.num_experts_per_tok,
        "device": device_name(), "mesh": model.programs.mesh_sizes, "dtype": model.precision,
        "backend": model.backend.name, "versions": versions(), "chat": arguments.chat, "temperature": 0.0,
    }  # fmt: skip


def _measured_on(
    arguments: argparse.Namespace,
    specs: Sequence[EvaluatedSpec],
    written: Sequence[TextSet],
    prompts: Mapping[str, list[list[int]]],
    questions: Mapping[str, list[Question]],
) -> dict[str, Any]:
    """Further inputs of the measurements, for the ledger."""
    numbers = {name: getattr(arguments, name) for name in ("tokens", "answer_tokens", "batch")}
    sets = {f"{s.name}, {s.kind}": digest([s.texts, s.given]) for s in written}
    sets |= {name: digest(ids) for name, ids in prompts.items()}
    sets |= {f"{name}, answered": digest([repr(question) for question in found]) for name, found in questions.items()}
    # None where there is none: older ledgers lack the name.
    numbers["also_load"] = arguments.also_load or None
    return numbers | {"ways": {evaluated.name: evaluated.columns() for evaluated in specs}, "sets": sets}


def _longest(written: Sequence[TextSet], prompts: Mapping[str, list[list[int]]], tokens: int) -> int:
    """Length of the longest text, those that the target is going to write included."""
    lengths = [len(text) for texts in written for text in texts.texts]
    return max([*lengths, *(len(prompt) + tokens for ids in prompts.values() for prompt in ids)], default=0)


if __name__ == "__main__":
    sys.exit(main())
