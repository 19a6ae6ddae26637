"""A profile: tree and budget that were found best for a model on a device, as a small JSON file."""

import dataclasses
from pathlib import Path
from typing import Any, TypedDict

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.errors import CheckpointError, RequestError, one_line
from moespec_jax.files import read_json, write_json

FORMAT = "moespec_jax profile 1"


class ProfileArguments(TypedDict):
    """Arguments of `Model.generate`."""

    tree: TreeConfig | None
    budget: BudgetConfig | None


def write_profile(path: Path, tree: TreeConfig | None, budget: BudgetConfig | None, about: dict[str, Any]) -> None:
    """Write a profile; `about` describes the measurement for a reader of the file."""
    found = {
        "tree": None if tree is None else dataclasses.asdict(tree),
        "budget": None if budget is None else budget.as_dict(),
    }
    write_json(path, {"format": FORMAT, **found, **about})


def read_profile(path: str | Path) -> ProfileArguments:
    """Read tree and budget: `model.generate(prompt, **read_profile("profile.json"))`.

    Raises:
        RequestError: there is no such file, or it is not a profile.
    """
    path = Path(path)
    try:
        given = read_json(path)
    except CheckpointError as error:
        raise RequestError(str(error)) from None
    if given.get("format") != FORMAT:
        raise RequestError(f"expected a profile of format {FORMAT!r} in {path}; got {shown(given.get('format'))}")
    try:
        tree = None if given["tree"] is None else TreeConfig(**_numbers(given["tree"]))
        budget = None if given["budget"] is None else _budget(given["budget"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(one_line(f"expected a tree and a budget in {path}; {error}")) from None
    if tree is None and budget is not None:
        raise RequestError(f"expected a tree with the budget in {path}; there is none")
    return ProfileArguments(tree=tree, budget=budget)


def _numbers(given: dict[str, Any]) -> dict[str, int]:
    for name, value in given.items():
        if type(value) is not int:
            raise ValueError(f"tree.{name} is {shown(value)}, expected a whole number")
    return given


def _budget(given: dict[str, Any]) -> BudgetConfig:
    """Of a resolved budget, one number for each layer comes as a list."""
    given = dict(given)
    experts = given.pop("experts")
    if not all(type(count) in (int, float) for count in (experts if isinstance(experts, list) else [experts])):
        raise ValueError(f"budget.experts is {shown(experts)}, expected numbers")
    for name, value in given.items():
        default = getattr(BudgetConfig, name, "")
        if not (type(value) is type(default) or (type(value) is int and isinstance(default, float))):
            raise ValueError(f"budget.{name} is {shown(value)}, expected one like {default!r}")
    return BudgetConfig(tuple(experts) if isinstance(experts, list) else experts, **given)
