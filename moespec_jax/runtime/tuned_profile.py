"""Profiles: JSON files with the tree and the budget that `moespec_jax.tune` found fastest for a model on a device. The
costs of rounds in them are read by `profile_costs.py`."""

import dataclasses
import math
import os
from numbers import Real
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
    write_json(path, {"format": FORMAT, **setting_fields(tree, budget), **about})


def setting_fields(tree: object, budget: BudgetConfig | None) -> dict[str, Any]:
    """Fields of a setting: those of its tree, which is none in plain decoding, and of its budget."""
    return {
        "tree": dataclasses.asdict(tree) if isinstance(tree, TreeConfig) else None,
        "budget": None if budget is None else budget.as_dict(),
    }


def read_profile(path: str | os.PathLike[str], *, max_kl: float | None = None) -> ProfileArguments:
    """Read tree and budget as arguments of `generate`: `model.generate(prompt, **read_profile("profile.json"))`.

    With `max_kl` they are those of the fastest setting that `tune` timed whose measured divergence from the exact
    target, mean nats a token, is at most that; in place of those of the profile's own bound.

    Raises:
        RequestError: the file is missing or is not a profile, or has no such setting.
    """
    path, profile = profile_fields(path)
    if max_kl is None:
        return _arguments(profile, path)
    own = settings_within(path, profile, max_kl)
    return max(own, key=lambda setting: setting[0])[1]


def settings_within(path: Path, profile: dict[str, Any], max_kl: float) -> list[tuple[float, ProfileArguments]]:
    """List the settings that were timed whose measured divergence is at most `max_kl` nats, each with its tokens a
    second. Exact settings have none.

    Raises:
        RequestError: `max_kl` is no divergence, or there are none.
    """
    if isinstance(max_kl, bool) or not isinstance(max_kl, Real):
        raise wrong_type("max_kl", "a number", max_kl)
    if not 0 <= max_kl < math.inf:
        raise RequestError(f"expected a divergence of at least 0 nats (--max-kl); got {max_kl}")
    try:
        rows = [row for row in profile.get("finalists", []) if "tree" in row]
        timed = [(_divergence(row), _positive(row["tokens_per_s"]["median"]), row) for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(one_line(f"expected timed settings in {path}; {error}")) from None
    if not timed:
        raise RequestError(
            f"expected the settings that were timed, to choose one by its divergence (--max-kl), in {path}; it has"
            " none: tune again"
        )
    found = [(speed, _arguments(row, path)) for divergence, speed, row in timed if divergence <= max_kl]
    if not found:
        least = min(divergence for divergence, _, _ in timed)
        raise RequestError(f"expected a setting of divergence {max_kl:g} or less in {path}; the least is {least:g}")
    return found


def _divergence(row: dict[str, Any]) -> float:
    if row["exact"] is True:
        return 0.0
    return _positive(row["loss"]["kl"])


def _positive(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise ValueError(f"a measurement is {shown(number)}, expected a number of at least 0")
    return float(number)


def _arguments(profile: dict[str, Any], path: Path) -> ProfileArguments:
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
