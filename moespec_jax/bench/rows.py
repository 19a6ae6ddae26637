"""One row for each setting: what its turns told, in the field's words, and how it compares with what is exact."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moespec_jax.bench.sweep import budget_name
from moespec_jax.cli.compare import agreement
from moespec_jax.measure.timing import Setting, speed, spread, tree_name

Turns = Sequence[Mapping[str, Mapping[str, Any]]]
# Of a run, what is the same in every turn.
_SAME = ("accept_length", "accepted_by_depth", "experts_wanted", "mass_kept", "tokens_replaced")


def result_rows(
    settings: Mapping[str, Setting], turns: Turns, floor: Callable[[float], float], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows in the order of the settings, each with `about`.

    `floor` is the seconds that a pass over a few tokens takes at the least which reads so many experts a layer. Ratios
    are of speeds in the same turn, and so is every median's range over turns.
    """
    best = best_exact(settings, turns)
    rows = []
    for name, setting in settings.items():
        against = {
            "over_plain": name_of(settings, setting._replace(tree=None, budget=None, simulate=None)),
            "over_exact_same_tree": name_of(settings, setting._replace(budget=None)),
            "over_best_exact": best[setting.batch],
        }
        rows.append(
            dict(about)
            | {"setting": name}
            | setting_columns(setting)
            | measured_columns([turn[name] for turn in turns], floor)
            | {column: ratios(turns, name, base) for column, base in against.items()}
            | {"best_exact": against["over_best_exact"]}
            | {"same_tokens_as_plain": same_tokens(turns[-1], name, against["over_plain"])}
        )
    return rows


def best_exact(settings: Mapping[str, Setting], turns: Turns) -> dict[int, str]:
    """For each batch size the setting without a budget, plain decoding included, of the highest median speed."""
    found: dict[int, str] = {}
    for name, setting in settings.items():
        if setting.budget is None:
            other = found.setdefault(setting.batch, name)
            if median_speed(turns, name) > median_speed(turns, other):
                found[setting.batch] = name
    return found


def median_speed(turns: Turns, name: str) -> float:
    """Tokens a second."""
    return statistics.median(speed(turn[name]) for turn in turns)


def name_of(settings: Mapping[str, Setting], setting: Setting) -> str:
    """The name that an equal setting has."""
    return next(name for name, other in settings.items() if other == setting)


def ratios(turns: Turns, name: str, base: str) -> dict[str, float]:
    """Speed over that of `base` in the same turn."""
    return spread([speed(turn[name]) / speed(turn[base]) for turn in turns])


def same_tokens(turn: Mapping[str, Mapping[str, Any]], name: str, plain: str) -> float | None:
    """Share of plain decoding's tokens before the first that differs; None where acceptance is simulated."""
    if turn[name]["simulated"] is not None:
        return None
    return agreement(turn[plain]["token_ids"], turn[name]["token_ids"])


def setting_columns(setting: Setting) -> dict[str, Any]:
    """The setting in SpecForge's words, zeros for plain decoding, and in ours."""
    tree, budget = setting.tree, setting.budget
    steps, top_k, size = (0, 0, 0) if tree is None else (tree.depth + 1, tree.top_k, tree.size)
    return {
        "batch_size": setting.batch, "steps": steps, "topk": top_k, "num_draft_tokens": size,
        "tree": tree_name(tree), "expert_budget": None if budget is None else budget_name(budget),
        "budget": None if budget is None else dataclasses.asdict(budget),
    }  # fmt: skip


def measured_columns(own: Sequence[Mapping[str, Any]], floor: Callable[[float], float]) -> dict[str, Any]:
    """What one setting's turns told: medians and ranges of times, and what is the same in all of them."""
    rounds = [told["decode_s"] / told["rounds"] for told in own]
    verified = own[0]["verify_s"] is not None
    alone = [floor(told["verify_experts"]) / told["verify_s"] for told in own] if verified else None
    return {
        "output_throughput": spread([speed(told) for told in own]),
        "round_ms": spread([seconds * 1e3 for seconds in rounds]),
        "verify_ms": spread([told["verify_s"] * 1e3 for told in own]) if verified else None,
        "prefill_ms": spread([told["prefill_s"] * 1e3 for told in own]),
        "compile_s": own[0]["compile_s"],
        "rounds": own[-1]["rounds"],
        **{name: own[-1][name] for name in _SAME},
        "experts_read": own[-1]["experts_loaded"],
        "round_share_of_copy_bandwidth": spread([floor(own[-1]["experts_loaded"]) / seconds for seconds in rounds]),
        "verify_share_of_copy_bandwidth": None if alone is None else spread(alone),
        "exact": all(told["exact"] for told in own),
        "simulated_accept_length": own[-1]["simulated"],
    }
