"""Cases to time: trees or SpecForge's configs, each without a budget and under every budget of the flags."""

import argparse
from collections.abc import Callable, Sequence
from typing import Literal

from moespec_jax.checkpoint.head.read import LoadedBlockDraft
from moespec_jax.cli.budget_flags import add_rule_flags, parse_budget, rule_of
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.measure.timing import TimingCase, parse_tree
from moespec_jax.runtime.drafters import Draft, check_drafted, menu_of
from moespec_jax.runtime.model import Model

TREES = ("4/2/1", "8/6/1", "16/4/4", "60/7/10")
# In place of a tree: every round chooses.
AUTO: Literal["auto"] = "auto"
BUDGETS = ("0.5", "0.25")


def add_sweep_flags(group: argparse._ArgumentGroup) -> None:
    """Add `--trees` or `--config-list`, `--budgets`, and the flags of the budgets' rule."""
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--trees",
        nargs="+",
        metavar="SIZE/DEPTH/TOP-K",
        help="draft trees, each as --tree-size, --tree-depth and --tree-top-k of moespec_jax.generate, with one prompt"
        " at a time; auto: every round chooses, as --speculate auto; plain decoding is always measured too (default:"
        f" {' '.join(TREES)}; of a DFlash or DSpark head, those that auto chooses from)",
    )
    which.add_argument(
        "--config-list",
        nargs="+",
        metavar="B,S,K,N",
        help="trees in SpecForge's notation, instead of --trees: batch size, steps (depth + 1), top-k and number of"
        " draft tokens (size); 1,0,0,0 is plain decoding; for example: 1,0,0,0 1,3,1,4 1,8,10,60",
    )
    group.add_argument(
        "--budgets",
        nargs="+",
        metavar="B",
        default=list(BUDGETS),
        help="expert budgets for each tree, as numbers or fractions of the experts; none: no budgets; every tree is"
        f" also measured without a budget (default: {' '.join(BUDGETS)})",
    )
    add_rule_flags(group)


def sweep(
    arguments: argparse.Namespace, simulate: Callable[[TreeConfig], float] | None = None, draft: Draft | None = None
) -> dict[str, TimingCase]:
    """List all cases by name, plain decoding first. `simulate` returns the simulated accept length of a tree; where no
    trees are given, they are those of `draft`.

    Raises:
        RequestError: a tree, config or budget is invalid, or appears twice.
    """
    shapes: list[tuple[int, TreeConfig | Literal["auto"] | None]]
    if arguments.config_list:
        shapes = [parse_config(text) for text in arguments.config_list]
    else:
        shapes = [(1, _shape(text)) for text in arguments.trees or trees_of(draft)]
        if simulate is not None and (1, AUTO) in shapes:
            raise RequestError("expected trees whose acceptance is simulated with --random; got auto")
    batches = list(dict.fromkeys(batch for batch, _ in shapes))
    cases = [TimingCase(batch=batch) for batch in batches]
    for batch, tree in shapes:
        if tree is None:
            continue
        length = None if simulate is None or tree == AUTO else simulate(tree)
        cases += [TimingCase(DecodingSpec(tree, b, length), batch) for b in (None, *budgets_of(arguments))]
    named = {case_name(case): case for case in cases}
    if len(named) < len(cases):
        raise RequestError("expected trees and budgets that differ; some of them are the same")
    return named


def trees_of(draft: Draft | None) -> Sequence[str]:
    """Choose the trees where none are given: of a block drafter, chains of its block."""
    return [tree.name for tree in menu_of(draft)] if isinstance(draft, LoadedBlockDraft) else TREES


def _shape(text: str) -> TreeConfig | Literal["auto"] | None:
    return AUTO if text == AUTO else parse_tree(text)


def parse_config(text: str) -> tuple[int, TreeConfig | None]:
    """Parse batch size and tree from `batch-size,steps,topk,num-draft-tokens`; None where the last three are 0.

    Raises:
        RequestError: the config is invalid.
    """
    try:
        batch, steps, top_k, size = (int(part) for part in text.split(","))
        if batch < 1:
            raise ValueError("the batch size is below 1")
        return batch, None if (steps, top_k, size) == (0, 0, 0) else TreeConfig(steps - 1, top_k, size)
    except ValueError as error:
        raise RequestError(
            f"expected a config as batch-size,steps,topk,num-draft-tokens (1,8,10,60, or 1,0,0,0 for plain decoding);"
            f" got {text!r}: {error}"
        ) from None


def budgets_of(arguments: argparse.Namespace) -> list[BudgetConfig]:
    """List the budgets of the flags; `none` adds nothing.

    Raises:
        RequestError: a budget is invalid, or there are flags of a rule without a budget.
    """
    texts, rule = [text for text in arguments.budgets if text != "none"], rule_of(arguments)
    if rule and not texts:
        raise RequestError("expected --budgets with the flags of a budget's rule; there are none")
    try:
        return [BudgetConfig(parse_budget(text), **rule) for text in texts]  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_sweep(cases: Sequence[TimingCase], model: Model, count: int) -> None:
    """Check that a model and a set of `count` prompts can run all cases, before anything is timed.

    Raises:
        RequestError: there is no draft head, its vocabulary is too small, or a batch size does not divide `count`.
    """
    trees = {case.spec.tree for case in cases if isinstance(case.spec.tree, TreeConfig)}
    if model.draft is None and any(case.spec.tree is not None for case in cases):
        raise RequestError("expected a draft head (--draft-model) to draft trees with, or --config-list 1,0,0,0 alone")
    for tree in trees:
        check_drafted(model.draft, tree)
    for case in cases:
        if count % case.batch:
            raise RequestError(f"expected as many prompts as fill batches of {case.batch}; there are {count}")


def case_name(case: TimingCase) -> str:
    """Name of a case: tree, budget, and batch size if it is not 1: `4/2/1`, `4/2/1 B=0.5`, `plain x8`."""
    return case.spec.name + ("" if case.batch == 1 else f" x{case.batch}")
