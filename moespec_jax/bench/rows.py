"""Rows of results, one for each case: measurements under SpecForge's and our names, and ratios to exact decoding."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moespec_jax.cli.compare import agreement
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.timing import TimingCase, spread, tokens_per_second

Turns = Sequence[Mapping[str, Mapping[str, Any]]]
# Measurements that are the same in every turn.
_SAME = ("accept_length", "accepted_by_depth", "experts_wanted", "mass_kept", "tokens_replaced")


def result_rows(
    cases: Mapping[str, TimingCase], turns: Turns, floor: Callable[[float], float], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make rows in the order of the cases, each with the columns `about`. Ratios are of speeds in the same turn.

    `floor` maps the number of experts that a layer reads to the least seconds of a pass over a few tokens (roofline).
    """
    best = best_exact(cases, turns)
    rows = []
    for name, case in cases.items():
        against = {
            "over_plain": name_of(cases, case._replace(spec=DecodingSpec())),
            "over_exact_same_tree": name_of(cases, case._replace(spec=dataclasses.replace(case.spec, budget=None))),
            "over_best_exact": best[case.batch],
        }
        rows.append(
            dict(about)
            | {"setting": name}
            | case_columns(case)
            | measured_columns([turn[name] for turn in turns], floor)
            | {column: ratios(turns, name, base) for column, base in against.items()}
            | {"best_exact": against["over_best_exact"]}
            | {"same_tokens_as_plain": same_tokens(turns[-1], name, against["over_plain"])}
        )
    return rows


def best_exact(cases: Mapping[str, TimingCase], turns: Turns) -> dict[int, str]:
    """Find the case without a budget, plain decoding included, of the highest median speed, for each batch size."""
    found: dict[int, str] = {}
    for name, case in cases.items():
        if case.spec.budget is None:
            other = found.setdefault(case.batch, name)
            if median_speed(turns, name) > median_speed(turns, other):
                found[case.batch] = name
    return found


def median_speed(turns: Turns, name: str) -> float:
    """Compute the median over turns, in tokens per second."""
    return statistics.median(tokens_per_second(turn[name]) for turn in turns)


def name_of(cases: Mapping[str, TimingCase], case: TimingCase) -> str:
    """Find the name of a case."""
    return next(name for name, other in cases.items() if other == case)


def ratios(turns: Turns, name: str, base: str) -> dict[str, float]:
    """Divide the speed by that of `base` in the same turn."""
    return spread([tokens_per_second(turn[name]) / tokens_per_second(turn[base]) for turn in turns])


def same_tokens(turn: Mapping[str, Mapping[str, Any]], name: str, plain: str) -> float | None:
    """Compute the share of plain decoding's tokens before the first difference; None where acceptance is simulated."""
    if turn[name]["simulated"] is not None:
        return None
    return agreement(turn[plain]["token_ids"], turn[name]["token_ids"])


def case_columns(case: TimingCase) -> dict[str, Any]:
    """Columns of a case under SpecForge's names (zeros for plain decoding, none where every round chooses) and ours."""
    tree, budget = case.spec.tree, case.spec.budget
    if case.spec.chooses:
        steps = top_k = size = None  # every round has its own
    else:
        assert tree is None or isinstance(tree, TreeConfig)
        steps, top_k, size = (0, 0, 0) if tree is None else (tree.depth + 1, tree.top_k, tree.size)
    return {
        "batch_size": case.batch, "steps": steps, "topk": top_k, "num_draft_tokens": size,
        "tree": case.spec.tree_name, "expert_budget": None if budget is None else budget.name,
        "budget": None if budget is None else budget.as_dict(),
    }  # fmt: skip


def measured_columns(own: Sequence[Mapping[str, Any]], floor: Callable[[float], float]) -> dict[str, Any]:
    """Columns of the measurements of one case: medians and ranges over turns, and values equal in all turns."""
    rounds = [stats["decode_s"] / stats["rounds"] for stats in own]
    verified, exchanged = own[0]["verify_s"] is not None, own[-1].get("exchanged_bytes")
    shares = [floor(stats["verify_experts"]) / stats["verify_s"] for stats in own] if verified else None
    return {
        "output_throughput": spread([tokens_per_second(stats) for stats in own]),
        "round_ms": spread([seconds * 1e3 for seconds in rounds]),
        "verify_ms": spread([stats["verify_s"] * 1e3 for stats in own]) if verified else None,
        "prefill_ms": spread([stats["prefill_s"] * 1e3 for stats in own]),
        "compile_s": own[0]["compile_s"],
        "rounds": own[-1]["rounds"],
        **{name: own[-1][name] for name in _SAME},
        "experts_read": own[-1]["experts_read"],
        "round_share_of_copy_bandwidth": spread([floor(own[-1]["experts_read"]) / seconds for seconds in rounds]),
        "verify_share_of_copy_bandwidth": None if shares is None else spread(shares),
        "exchanged_mb": None if exchanged is None else exchanged / 1e6,
        "exact": all(stats["exact"] for stats in own),
        "simulated_accept_length": own[-1]["simulated"],
        "choice": own[-1].get("choice"),
    }
