"""Find the fastest tree and expert budget for a model on this device: `python -m moespec_jax.tune`.

Measures what a round costs on this device and what is accepted on these prompts, predicts the speed of every setting,
times the ten fastest predictions against plain decoding, and writes the fastest measured one to profile.json, which
python -m moespec_jax.generate reads with --profile (with --speculate auto, the costs of rounds in it). Decoding is
greedy, one prompt at a time. By default only exact settings are searched (--exact); --max-kl and --min-agreement admit
expert budgets whose measured loss is within them. Of an EAGLE-3 head all trees are predicted; of other drafters a few
are timed: the chains of a DFlash or DSpark head's block, and trees that suit ngram and self:K.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moespec_jax.checkpoint.head.read import LoadedDraft
from moespec_jax.cli.arguments import add_mesh_flag, add_model_flags, load_requested, shown_name
from moespec_jax.cli.command import command_parser, require_matplotlib, run_command, write_tables
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.files import write_text
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import add_prompt_set_flags, check_prompt_sets, prompt_sets
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import device_name, versions
from moespec_jax.runtime.tuned_profile import write_profile
from moespec_jax.tune.candidates import DEPTH, SIZES, TOP_KS, requested_grid, search_space
from moespec_jax.tune.cost import TERMS
from moespec_jax.tune.report import bound_text, draw, rows, table, verdict
from moespec_jax.tune.round_times import cost_tables
from moespec_jax.tune.search import Bound, Outcome, SearchConfig, find_fastest

EXAMPLE = """
example:
  python -m moespec_jax.tune --model MODEL --draft-model HEAD --prompts mine=prompts.jsonl --max-kl 0.01 --output tuned
  python -m moespec_jax.generate --model MODEL --draft-model HEAD --profile tuned/profile.json

The same command continues an interrupted search.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("tune", __doc__, EXAMPLE)
    add_model_flags(group := parser.add_argument_group("model"))
    add_mesh_flag(group)
    group = parser.add_argument_group("prompts")
    add_prompt_set_flags(group, count=12)
    group.add_argument("--tokens", type=int, default=96, metavar="N", help="new tokens of each prompt (default: 96)")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompts")
    group = parser.add_argument_group("bound on the loss")
    group.add_argument("--exact", action="store_true", help="no loss: only settings whose output is exact (default)")
    group.add_argument(
        "--max-kl", type=float, metavar="X", help="largest mean divergence from the exact target, in nats a token"
    )
    group.add_argument(
        "--min-agreement",
        type=float,
        metavar="Y",
        help="smallest share of tokens whose most probable choice is that of the exact target",
    )
    group = parser.add_argument_group("search space")
    group.add_argument(
        "--tree-depth",
        type=int,
        metavar="D",
        help=f"largest depth of a tree (default: {DEPTH}; without these three flags, drafters other than EAGLE-3 heads"
        " have trees of their own, docs/drafters.md)",
    )
    group.add_argument(
        "--tree-top-ks",
        type=int,
        nargs="+",
        metavar="K",
        help=f"widths of trees; 1 is a chain (default: {' '.join(map(str, TOP_KS))})",
    )
    group.add_argument(
        "--tree-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tokens verified in one pass, of trees wider than a chain (default: {' '.join(map(str, SIZES))})",
    )
    group.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.25, 0.375, 0.5, 0.75],
        metavar="F",
        help="fractions of the experts that a layer may read (default: 0.25 0.375 0.5 0.75)",
    )
    group.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of the final timing (default: 5)")
    parser.add_argument(
        "--output", type=Path, default=Path("tuned"), metavar="DIR", help="directory of the results (default: tuned)"
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    bound = _bound(arguments)
    require_matplotlib()
    check_prompt_sets(arguments)
    space = arguments.tree_depth, arguments.tree_top_ks, arguments.tree_sizes
    if not requested_grid(*space) or arguments.repeats < 1 or arguments.tokens < 2:
        raise RequestError("expected at least one tree to search, one repeat and two tokens")
    model = load_requested(arguments)
    if model.draft is None:
        raise RequestError(
            "expected a draft head or another drafter to draft trees with (--draft-model); the model was loaded without"
            " one"
        )
    trees = search_space(model.draft, *space)
    sets = prompt_sets(model, arguments)
    prompts = [prompt for prompts in sets.values() for prompt in prompts]
    search = SearchConfig(bound, trees, _budgets(arguments.budgets, model), arguments.tokens, arguments.repeats)
    about = _about(model, arguments, {name: len(prompts) for name, prompts in sets.items()})
    arguments.output.mkdir(parents=True, exist_ok=True)
    flags = _space(arguments, model) | {"longest_prompt": arguments.longest_prompt}
    whole = about | flags | {"budgets": search.budgets, "bound": bound._asdict(), "repeats": search.repeats}
    ledger = Ledger(arguments.output / "tune.jsonl", whole)
    outcome = find_fastest(model, prompts, search, ledger)
    names = {name: about[name] for name in ("model", "draft_model")}
    costs = cost_tables(outcome.timed, lambda spec: model.costs_identity(spec, 1) | names)
    _write(outcome, bound, about, costs, arguments.output)
    write_tables(f"{table(outcome)}\n\n{verdict(outcome, bound)}\nprofile: {arguments.output / 'profile.json'}\n")


def _space(arguments: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Describe the searched trees in the ledger."""
    given = {
        "tree_depth": arguments.tree_depth,
        "tree_top_ks": arguments.tree_top_ks,
        "tree_sizes": arguments.tree_sizes,
    }
    if not isinstance(model.draft, LoadedDraft):
        return given
    whole = {"tree_depth": DEPTH, "tree_top_ks": list(TOP_KS), "tree_sizes": list(SIZES)}
    return {name: whole[name] if value is None else value for name, value in given.items()}


def _bound(arguments: argparse.Namespace) -> Bound:
    bound = Bound(arguments.max_kl, arguments.min_agreement)
    if arguments.exact and not bound.exact:
        raise RequestError("expected either --exact or a bound on the loss (--max-kl, --min-agreement); got both")
    if bound.max_kl is not None and not bound.max_kl > 0:
        raise RequestError(f"expected --max-kl above 0 (--exact for none); got {bound.max_kl}")
    if bound.min_agreement is not None and not 0 < bound.min_agreement <= 1:
        raise RequestError(f"expected --min-agreement above 0 and up to 1; got {bound.min_agreement}")
    return bound


def _budgets(fractions: Sequence[float], model: Model) -> list[int]:
    """Convert fractions to distinct numbers of experts, none below the number of experts of one token.

    Raises:
        RequestError: a fraction is out of range.
    """
    total, k = model.config.num_experts, model.config.num_experts_per_tok
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise RequestError(f"expected --budgets as fractions of the experts, above 0 and up to 1; got {fractions}")
    return sorted({min(max(round(fraction * total), k), total) for fraction in fractions})


def _about(model: Model, arguments: argparse.Namespace, sets: dict[str, int]) -> dict[str, Any]:
    assert model.draft is not None
    return {
        "model": shown_name(arguments.model), "draft_model": shown_name(model.draft.name), "prompts": sets,
        "new_tokens": arguments.tokens, "batch": 1,
        "temperature": 0.0, "device": device_name(), "mesh": model.programs.mesh_sizes, "cores": os.cpu_count(),
        "dtype": model.precision, "versions": versions(),
    }  # fmt: skip


def _write(outcome: Outcome, bound: Bound, about: dict[str, Any], costs: list[dict[str, Any]], directory: Path) -> None:
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
        "costs": costs,
    }
    report = f"# Fastest setting ({bound_text(bound)})\n\n{verdict(outcome, bound)}\n\n{table(outcome)}\n\n"
    report += f"{json.dumps(about)}\n"
    write_text(directory / "tune.md", report)
    draw(outcome, directory / "tune.png")
    spec = DecodingSpec() if best is None else best.candidate.spec
    assert spec.tree is None or isinstance(spec.tree, TreeConfig)
    write_profile(directory / "profile.json", spec.tree, spec.budget, about | measured)


if __name__ == "__main__":
    sys.exit(main())
