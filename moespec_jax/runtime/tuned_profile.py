"""Profiles: JSON files with the tree and the budget that `moespec_jax.tune` found fastest for a model on a device. The
costs of rounds in them are read by `profile_costs.py`."""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypedDict

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, current_fields
from moespec_jax.errors import CheckpointError, RequestError, one_line, wrong_type
from moespec_jax.files import expanded, read_json, write_json

FORMAT = "moespec_jax profile 1"


class ProfileArguments(TypedDict):
    """Arguments of `Model.generate`."""

    tree: TreeConfig | None
    budget: BudgetConfig | None


def write_profile(path: Path, tree: TreeConfig | None, budget: BudgetConfig | None, about: dict[str, Any]) -> None:
    """Write a profile; `about` describes the measurement and is not read back."""
    chosen = {
        "tree": None if tree is None else dataclasses.asdict(tree),
        "budget": None if budget is None else budget.as_dict(),
    }
    write_json(path, {"format": FORMAT, **chosen, **about})


def read_profile(path: str | os.PathLike[str]) -> ProfileArguments:
    """Read tree and budget as arguments of `generate`: `model.generate(prompt, **read_profile("profile.json"))`.

    Raises:
        RequestError: the file is missing or is not a profile.
    """
    path, profile = profile_fields(path)
    try:
        tree = None if profile["tree"] is None else TreeConfig(**_check_integers(profile["tree"]))
        budget = None if profile["budget"] is None else budget_from(profile["budget"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(one_line(f"expected a tree and a budget in {path}; {error}")) from None
    if tree is None and budget is not None:
        raise RequestError(f"expected a tree with the budget in {path}; there is none")
    return ProfileArguments(tree=tree, budget=budget)


def profile_fields(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Read the fields of a profile, unchecked; also returns its path.

    Raises:
        RequestError: the file is missing or is not a profile.
    """
    if not isinstance(path, str | os.PathLike):
        raise wrong_type("a profile", "a file", path)
    path = expanded(path)
    try:
        profile = read_json(path)
    except CheckpointError as error:
        raise RequestError(str(error)) from None
    if profile.get("format") != FORMAT:
        raise RequestError(f"expected a profile of format {FORMAT!r} in {path}; got {shown(profile.get('format'))}")
    return path, profile


def _check_integers(fields: dict[str, Any]) -> dict[str, int]:
    for name, value in fields.items():
        if type(value) is not int:
            raise ValueError(f"tree.{name} is {shown(value)}, expected a whole number")
    return fields


def budget_from(fields: dict[str, Any]) -> BudgetConfig:
    """Read a budget, also with its older field names. A list of experts has one number for each layer.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: these are not the fields of a budget.
    """
    fields = current_fields(fields)
    experts = fields.pop("experts")
    if not all(type(count) in (int, float) for count in (experts if isinstance(experts, list) else [experts])):
        raise ValueError(f"budget.experts is {shown(experts)}, expected numbers")
    for name, value in fields.items():
        default = getattr(BudgetConfig, name, "")
        if not (type(value) is type(default) or (type(value) is int and isinstance(default, float))):
            raise ValueError(f"budget.{name} is {shown(value)}, expected one like {default!r}")
    return BudgetConfig(tuple(experts) if isinstance(experts, list) else experts, **fields)
