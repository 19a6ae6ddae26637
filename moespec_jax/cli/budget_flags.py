"""Flags of an expert budget, shared by several commands, and their values."""

import argparse
from typing import Any

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.budget_config import BudgetConfig, current_fields, resolve
from moespec_jax.decoding.budget_rules import ANCHORS, COVERAGES, EXPERT_WEIGHTS, SCORES, SIZES
from moespec_jax.errors import RequestError

# Fields of `BudgetConfig` that have a flag `--budget-...`.
_RULE = (
    "coverage", "score", "credit", "anchor", "size", "mass", "anchor_probability", "min_kept_weight", "groups",
)  # fmt: skip


def rule_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `BudgetConfig` whose `--budget-...` flags are present."""
    values = {name: getattr(arguments, f"budget_{name}") for name in _RULE}
    return current_fields({name: value for name, value in values.items() if value is not None})


def budget_of(arguments: argparse.Namespace) -> BudgetConfig | None:
    """Read the budget of the flags; None without one.

    Raises:
        RequestError: the budget is invalid, or there are flags of its rule without `--expert-budget`.
    """
    if arguments.expert_budget in (None, "none"):
        present = next((name for name in _RULE if getattr(arguments, f"budget_{name}") is not None), None)
        if present is not None:
            flag = f"--budget-{present.replace('_', '-')}"
            raise RequestError(f"{flag} is part of a budget; expected --expert-budget with it")
        return None
    try:
        return BudgetConfig(parse_budget(arguments.expert_budget), **rule_of(arguments))
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_budget(budget: BudgetConfig | None, config: DecoderConfig) -> None:
    """Check that a budget fits a model.

    Raises:
        RequestError: it does not.
    """
    try:
        if budget is not None:
            resolve(budget, config)
    except ValueError as error:
        raise RequestError(str(error)) from None


def parse_budget(text: str) -> int | float | tuple[int | float, ...]:
    """Parse numbers or fractions of experts, one for all sparse layers or one for each: `16`, `0.25`, `12,16,16,24`."""
    try:
        numbers = tuple(float(part) if "." in part or "e" in part.lower() else int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"expected --expert-budget as a number of experts (16), a fraction of them (0.25), or one of these for each"
            f" sparse layer between commas; got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def add_budget_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a budget: the number of experts, and the rule that chooses them."""
    group.add_argument(
        "--expert-budget",
        metavar="B",
        help="largest number of experts that a layer reads in a verification: a number (16), a fraction of all experts"
        " (0.25), or one of these for each sparse layer between commas (default: none, which is exact)",
    )
    add_rule_flags(group)


def add_rule_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a budget's rule. The second of two names is an older one."""
    rule = BudgetConfig
    group.add_argument(
        "--budget-coverage",
        "--budget-policy",
        choices=[*COVERAGES, "guarantee"],
        help="routing of a token whose experts are not read: to its best experts among those read (substitute), or to"
        " none in their place (truncate); guarantee: substitute with --budget-anchor likely (default:"
        f" {rule.coverage})",
    )
    group.add_argument(
        "--budget-score",
        choices=list(SCORES),
        help="weight of a token in the experts' scores: 1 (probability), its path probability (path), or the acceptance"
        f" rate of its depth (depth) (default: {rule.score})",
    )
    group.add_argument(
        "--budget-credit",
        choices=list(EXPERT_WEIGHTS),
        help="what a token adds to the score of each expert: its router probability (all), the same of its own experts"
        f" only (hits), or its squared combine weight (squares) (default: {rule.credit})",
    )
    group.add_argument(
        "--budget-anchor",
        choices=list(ANCHORS),
        help="tokens whose own experts precede all others: none, the root, or all likely ones (default:"
        f" {rule.anchor})",
    )
    group.add_argument(
        "--budget-size",
        choices=list(SIZES),
        help="how many of the B experts are read: B (fixed), as few as hold --budget-mass of the scores (mass), or the"
        f" effective rank of the scores (rank) (default: {rule.size})",
    )
    _add_rule_numbers(group)


def _add_rule_numbers(group: argparse._ArgumentGroup) -> None:
    rule = BudgetConfig
    group.add_argument(
        "--budget-mass",
        type=float,
        metavar="P",
        help=f"share of the scores for --budget-size mass (default: {rule.mass})",
    )
    group.add_argument(
        "--budget-anchor-probability",
        "--budget-guarantee",
        type=float,
        metavar="P",
        help="path probability from which --budget-anchor likely includes a token (default:"
        f" {rule.anchor_probability})",
    )
    group.add_argument(
        "--budget-min-kept-weight",
        "--budget-faithfulness",
        type=float,
        metavar="F",
        help="prune drafted tokens of which a layer keeps less than this share of their own experts' combine weight; 0"
        f" prunes none, 1 with --budget-anchor root or likely is exact (default: {rule.min_kept_weight:g})",
    )
    group.add_argument(
        "--budget-groups",
        type=int,
        metavar="N",
        help="divide the budget evenly among N groups of consecutive experts: with N equal to expert= of --mesh, no"
        f" device reads more than its share; 1 ranks all experts together (default: {rule.groups})",
    )
