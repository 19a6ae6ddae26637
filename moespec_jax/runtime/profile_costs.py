"""Costs of rounds in a profile: every round chooses its shape by them, in place of costs measured in the first runs."""

import math
import os
import statistics
from collections.abc import Collection, Sequence
from typing import Any, TypedDict

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.errors import RequestError, one_line
from moespec_jax.runtime.drafters import MENU
from moespec_jax.runtime.tuned_profile import budget_from, profile_fields, read_profile, settings_within

_PLAIN = "plain"


class CostArguments(TypedDict):
    """Arguments of `Model.generate`."""

    tree: CostTable
    budget: BudgetConfig | None


def read_costs(path: str | os.PathLike[str], *, max_kl: float | None = None) -> CostArguments:
    """Read the costs of rounds under a profile's budget, and the budget, as arguments of `generate`:
    `model.generate(prompt, **read_costs("profile.json"))`. Every round is then plain, or drafts the tree that pays most
    by these costs. With `max_kl` the budget is that of `read_profile(path, max_kl=max_kl)`, and under it there are only
    trees whose measured divergence is at most that.

    Raises:
        RequestError: the file is missing or is not a profile, or has no costs of rounds under the budget.
    """
    budget, trees = read_profile(path, max_kl=max_kl)["budget"], None
    if max_kl is not None and budget is not None:
        within = [setting for _, setting in settings_within(*profile_fields(path), max_kl)]
        trees = {setting["tree"] for setting in within if setting["budget"] == budget}
    return CostArguments(tree=cost_table(path, budget, trees), budget=budget)


def cost_table(
    path: str | os.PathLike[str], budget: BudgetConfig | None, among: Collection[TreeConfig | None] | None = None
) -> CostTable:
    """Read the costs of rounds that a profile has for a budget: of plain decoding, the tree that gains most tokens a
    second, those of the menu without a profile, and then the fastest others, one more than that menu has; only trees
    `among` some.

    Raises:
        RequestError: there are none.
    """
    path, profile = profile_fields(path)
    try:
        found = [table for table in profile.get("costs", []) if _budget(table) == budget]
        table = _read(found[0], str(path)) if found else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(one_line(f"expected costs of rounds in {path}; {error}")) from None
    if table is not None and among is not None:
        table = _part(table, [tree for tree in table.trees if tree in among])
    if table is None or not table.trees:
        under = "" if budget is None else f" under a budget of {budget.name}"
        raise RequestError(
            f"expected costs of rounds{under} in {path}, to choose every round's shape by; it has none: tune again, or"
            " leave out --profile, and they are measured in the first runs"
        )
    return _menu(table)


def _read(fields: dict[str, Any], source: str) -> CostTable:
    names, measured = fields["shapes"], [fields["seconds"], fields["tokens"]]
    if not all(len(part) == len(names) for part in measured) or names[0] != _PLAIN:
        raise ValueError("expected shapes, plain first, with as many lists of seconds and of tokens")
    numbers = [number for part in measured for of_shape in part for number in of_shape]
    if not all(type(number) in (int, float) and 0 < number and math.isfinite(number) for number in numbers):
        raise ValueError("expected seconds and tokens above 0")
    if not all(of_shape for part in measured for of_shape in part):
        raise ValueError("expected a measurement of every shape")
    seconds, tokens = (tuple(tuple(map(float, of_shape)) for of_shape in part) for part in measured)
    trees = tuple(TreeConfig.of_name(name) for name in names[1:])
    if len(set(trees)) < len(trees):
        raise ValueError("expected each shape once")
    return CostTable(trees, seconds, tokens, source, dict(fields["identity"]))


def _menu(table: CostTable) -> CostTable:
    """Keep the shapes that rounds choose from."""
    measured = zip(table.trees, table.seconds[1:], table.tokens[1:], strict=True)
    speeds = {tree: statistics.fmean(tokens) / min(seconds) for tree, seconds, tokens in measured}
    fastest = sorted(speeds, key=lambda tree: -speeds[tree])
    order = dict.fromkeys([fastest[0], *(tree for tree in MENU if tree in speeds), *fastest])
    return _part(table, sorted(list(order)[: len(MENU) + 1], key=lambda tree: tree.size))


def _part(table: CostTable, trees: Sequence[TreeConfig]) -> CostTable:
    places = [0, *(1 + table.trees.index(tree) for tree in trees)]
    seconds, tokens = (tuple(part[i] for i in places) for part in (table.seconds, table.tokens))
    return CostTable(tuple(trees), seconds, tokens, table.source, table.identity)


def _budget(table: dict[str, Any]) -> BudgetConfig | None:
    fields = table["identity"]["budget"]
    return None if fields is None else budget_from(fields)
