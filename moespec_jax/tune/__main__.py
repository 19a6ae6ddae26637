"""Find the fastest tree and budget for a model on this device: `python -m moespec_jax.tune`.

Measures what a round costs here and what is accepted on these prompts, predicts every setting's speed, times the ten
best against plain decoding, and writes the winner as a profile. Greedy decoding, one prompt at a time. By default
nothing may be lost (--exact); --max-kl and --min-agreement allow expert budgets that lose no more than that.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moespec_jax.checkpoint.tokenizer import chat_prompt
from moespec_jax.cli.arguments import add_model_flags, load_requested, shown_name
from moespec_jax.cli.command import Parser, run_command, write_output
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.files import write_text
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import add_prompt_set_flags, check_prompt_sets, prompt_sets
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions
from moespec_jax.runtime.tuned_profile import write_profile
from moespec_jax.tune.candidates import grid
from moespec_jax.tune.cost import TERMS
from moespec_jax.tune.report import bound_text, draw, rows, table, verdict
from moespec_jax.tune.search import Bound, Outcome, SearchConfig, find_fastest

EXAMPLE = """
example:
  python -m moespec_jax.tune --model MODEL --draft-model HEAD --prompts mine=prompts.jsonl --max-kl 0.01 --output tuned
  python -m moespec_jax.generate --model MODEL --draft-model HEAD --profile tuned/profile.json

Interrupted, it goes on where it was with the same command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m moespec_jax.tune", description=__doc__, epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("prompts")
    add_prompt_set_flags(group, count=12)
    group.add_argument("--tokens", type=int, default=96, help="new tokens a prompt (96)")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompts")
    group = parser.add_argument_group("what may be lost")
    group.add_argument("--exact", action="store_true", help="nothing (default)")
    group.add_argument(
        "--max-kl", type=float, metavar="X", help="mean divergence from the exact target, in nats a token"
    )
    group.add_argument(
        "--min-agreement", type=float, metavar="Y", help="share of tokens whose first choice is the exact target's own"
    )
    group = parser.add_argument_group("what is searched")
    group.add_argument("--tree-depth", type=int, default=7, metavar="D", help="deepest tree (7)")
    group.add_argument("--tree-top-ks", type=int, nargs="+", default=[1, 2, 4, 10], help="widths (1 2 4 10)")
    group.add_argument(
        "--tree-sizes", type=int, nargs="+", default=[4, 6, 8, 12, 16, 24, 32, 48, 60], help="tokens verified at once"
    )
    group.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.25, 0.375, 0.5, 0.75],
        metavar="F",
        help="fractions of the experts",
    )
    group.add_argument("--repeats", type=int, default=5, help="turns in which the ten best are timed (5)")
    parser.add_argument("--output", type=Path, default=Path("tuned"), metavar="DIR", help="what is written (tuned)")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    bound = _bound(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("expected matplotlib, which draws the figure: pip install moespec_jax[plots]")
    check_prompt_sets(arguments)
    try:
        trees = grid(arguments.tree_depth, arguments.tree_top_ks, arguments.tree_sizes)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if not trees or arguments.repeats < 1 or arguments.tokens < 2:
        raise RequestError("expected at least one tree to search, one repeat and two tokens")
    model = load_requested(arguments)
    if model.draft is None:
        raise RequestError("expected a draft head to tune the use of; give --draft-model")
    as_chat = (lambda text: chat_prompt(model.directory, text, None, True)) if arguments.chat else None
    sets = prompt_sets(model, arguments, as_chat)
    prompts = [prompt for prompts in sets.values() for prompt in prompts]
    search = SearchConfig(bound, trees, _budgets(arguments.budgets, model), arguments.tokens, arguments.repeats)
    about = _about(model, arguments, {name: len(prompts) for name, prompts in sets.items()})
    arguments.output.mkdir(parents=True, exist_ok=True)
    flags = {name: getattr(arguments, name) for name in ("tree_depth", "tree_top_ks", "tree_sizes", "longest_prompt")}
    whole = about | flags | {"budgets": search.budgets, "bound": bound._asdict(), "repeats": search.repeats}
    ledger = Ledger(arguments.output / "tune.jsonl", whole)
    outcome = find_fastest(model, prompts, search, ledger)
    _write(outcome, bound, about, arguments.output)
    write_output(f"{table(outcome)}\n\n{verdict(outcome, bound)}\nprofile: {arguments.output / 'profile.json'}\n")


def _bound(arguments: argparse.Namespace) -> Bound:
    bound = Bound(arguments.max_kl, arguments.min_agreement)
    if arguments.exact and not bound.exact:
        raise RequestError("expected either --exact or a bound on the loss; got both")
    if bound.max_kl is not None and not bound.max_kl > 0:
        raise RequestError(f"expected --max-kl above 0 (--exact for none); got {bound.max_kl}")
    if bound.min_agreement is not None and not 0 < bound.min_agreement <= 1:
        raise RequestError(f"expected --min-agreement above 0 and up to 1; got {bound.min_agreement}")
    return bound


def _budgets(fractions: Sequence[float], model: Model) -> list[int]:
    """Numbers of experts, at least one token's own and fewer than all."""
    total, k = model.config.num_experts, model.config.num_experts_per_tok
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise RequestError(f"expected --budgets as fractions of the experts, above 0 and up to 1; got {fractions}")
    return sorted({min(max(round(fraction * total), k), total) for fraction in fractions})


def _about(model: Model, arguments: argparse.Namespace, sets: dict[str, int]) -> dict[str, Any]:
    device = jax.devices()[0]
    assert model.draft is not None
    return {
        "model": shown_name(arguments.model), "draft_model": shown_name(model.draft.name), "prompts": sets,
        "new_tokens": arguments.tokens, "batch": 1,
        "temperature": 0.0, "device": f"{device.platform} ({device.device_kind})", "cores": os.cpu_count(),
        "dtype": model.precision, "versions": versions(),
    }  # fmt: skip


def _write(outcome: Outcome, bound: Bound, about: dict[str, Any], directory: Path) -> None:
    found = rows(outcome)
    best = outcome.best
    measured = {
        "chosen": found[0] if best is not None else found[-1],
        "plain_tokens_per_s": found[-1]["tokens_per_s"],
        "bound": bound_text(bound),
        "prices_ms": dict(zip(TERMS, (round(price * 1e3, 6) for price in outcome.cost.prices), strict=True)),
        "considered": outcome.considered,
        "refused": outcome.refused,
        "finalists": found,
    }
    report = f"# Tuned within {bound_text(bound)}\n\n{verdict(outcome, bound)}\n\n{table(outcome)}\n\n"
    report += f"{json.dumps(about)}\n"
    write_text(directory / "tune.md", report)
    draw(outcome, directory / "tune.png")
    spec = DecodingSpec() if best is None else best.candidate.spec
    assert spec.tree != "default"
    write_profile(directory / "profile.json", spec.tree, spec.budget, about | measured)


if __name__ == "__main__":
    sys.exit(main())
