"""Measurements as rows: a table for each figure, and a mapping from columns to values for each row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moespec_jax.cli.compare import agreement
from moespec_jax.config import DecoderConfig
from moespec_jax.measure.fidelity import DRAWS
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.timing import spread, tokens_per_second
from moespec_jax.study.coactivation import lift
from moespec_jax.study.demand import least_budget, uniform_union
from moespec_jax.study.finding import mean_interval
from moespec_jax.study.measure import (
    OWN,
    Plan,
    exact_key,
    forced_key,
    kinds,
    reconstruction_key,
    timed_cases,
    timed_key,
)
from moespec_jax.study.rules import mark

Row = dict[str, Any]
HELD = 0.9  # share of the mass whose least budget is reported
ALL = "all sets"  # in place of a set's name, in rows over all of them
_MEANS = ("nll", "perplexity", "accept_length", "experts_wanted", "experts_read", "tokens_replaced")


def union_rows(config: DecoderConfig, sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List the distinct experts by number of nodes, of each layer and of the mean of layers."""
    rows = []
    for name in sets:
        stats = ledger.get(f"{name}: demand")
        for layer, curve in _by_layer(stats["unions"]):
            nodes = np.arange(1, len(curve) + 1)
            uniform = uniform_union(config.num_experts, config.num_experts_per_tok, nodes)
            for n, experts, expected in zip(nodes.tolist(), curve, uniform, strict=True):
                row = {"set": name, "layer": layer, "nodes": n, "experts": _round(experts)}
                rows.append(row | {"uniform": _round(expected), "trees": stats["trees"]})
    return rows


def mass_rows(sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List the share of router probability by budget, and the least budget that keeps `HELD` of it."""
    rows = []
    for name in sets:
        stats = ledger.get(f"{name}: demand")
        for layer, curve in _by_layer(stats["kept_mass"]):
            least = int(least_budget(curve, HELD))
            for budget, mass in enumerate(curve.tolist(), 1):
                row = {"set": name, "layer": layer, "budget": budget, "mass": _round(mass)}
                rows.append(row | {f"least_budget_for_{HELD:.0%}": least, "trees": stats["trees"]})
    return rows


def frontier_rows(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List divergence, agreement and acceptance by rule and budget: means over the own texts of all sets, if there are
    several sets, then those of each set and kind of text."""
    rows = []
    joint = [[(name, OWN) for name in sets]] if len(sets) > 1 else []
    for texts in joint + [[(name, kind)] for name in sets for kind in kinds(name)]:
        cases: list[tuple[str, int] | None] = [None, *((rule, b) for rule in plan.rules for b in plan.budgets)]
        for case in cases:
            keys = [exact_key(*text) if case is None else forced_key(*text, *case) for text in texts]
            row = {"set": texts[0][0] if len(texts) == 1 else ALL, "text": texts[0][1]}
            row |= {"rule": case[0] if case else "no budget", "budget": case[1] if case else None}
            row |= {"output": mark(*case, config) if case else "exact"}
            rows.append(row | _forced([ledger.get(key) for key in keys]))
    return rows


def throughput_rows(plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List the speed of every timed case, in turns with plain decoding, and the share of plain decoding's tokens before
    the first that differs."""
    rows = []
    for name in sets:
        turns = range(plan.repeats)
        plain = [ledger.get(timed_key(name, turn, "plain")) for turn in turns]
        for label, case in timed_cases(plan).items():
            stats = [ledger.get(timed_key(name, turn, label)) for turn in turns]
            rule, _, budget = label.rpartition(", B = ")
            row = {"set": name, "rule": rule or label, "budget": int(budget) if rule else None}
            row |= {"output": "exact" if stats[-1]["exact"] else "lossy"}
            for column, values in {
                "tokens_per_s": [tokens_per_second(one) for one in stats],
                "over_plain": [
                    tokens_per_second(one) / tokens_per_second(other) for one, other in zip(stats, plain, strict=True)
                ],
            }.items():
                row |= {f"{column}_{key}": _round(value) for key, value in spread(values).items()}
            same = agreement(plain[-1]["token_ids"], stats[-1]["token_ids"])
            row |= {"agreement": _round(same), "accept_length": _round(stats[-1]["accept_length"])}
            row |= {"experts_read": _round(stats[-1]["experts_read"]), "compile_s": _round(stats[-1]["compile_s"])}
            batch = {"prompts": len(stats[-1]["token_ids"]), "tokens": plan.timed_tokens, "repeats": plan.repeats}
            rows.append(row | batch | ({} if case.spec.tree else {"accept_length": 1.0}))
    return rows


def reconstruction_rows(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List ||y_budget - y||^2 / ||y||^2 by rule, budget and layer, over all rows and over the committed ones."""
    rows = []
    for name in sets:
        for rule in plan.rules:
            for budget in plan.budgets:
                stats = ledger.get(reconstruction_key(name, rule, budget))
                sums = {key: np.array(value) for key, value in stats.items()}
                for layer in ["mean", *range(len(sums["rows"]))]:
                    rows.append(
                        {"set": name, "rule": rule, "budget": budget, "output": mark(rule, budget, config)}
                        | {"layer": layer} | _losses(sums, layer)
                    )  # fmt: skip
    return rows


def coactivation_rows(sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List every pair of experts of the counted layers, over all sets."""
    rows = []
    for layer, pairs in pair_counts(sets, ledger).items():
        lifted = lift(pairs)
        for a in range(len(pairs)):
            for b in range(a + 1, len(pairs)):
                row = {"layer": layer, "expert_a": a, "expert_b": b, "tokens_a": int(pairs[a, a])}
                row |= {"tokens_b": int(pairs[b, b]), "together": int(pairs[a, b])}
                rows.append(row | {"times_independent": _round(lifted[a, b])})
    return rows


def pair_counts(sets: Sequence[str], ledger: Ledger) -> dict[int, np.ndarray]:
    """Count the tokens of all sets that selected each pair of experts, by layer."""
    stats = [ledger.get(f"{name}: coactivation") for name in sets]
    return {int(layer): np.sum([one[layer] for one in stats], axis=0) for layer in stats[0]}


def acceptance_rows(sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """List the share of rounds that commit a node of each depth, without a budget."""
    rows = []
    for name in sets:
        for kind in kinds(name):
            stats = ledger.get(exact_key(name, kind))
            committed, rounds = np.array(stats["committed_by_text"]), np.array(stats["rounds_by_text"])
            low, high = _ratio_interval(committed, rounds)
            for depth, share in enumerate(committed.sum(axis=0) / rounds.sum(), 1):
                row = {"set": name, "text": kind, "depth": depth, "accepted": _round(share)}
                row |= {"accepted_low": _round(low[depth - 1]), "accepted_high": _round(high[depth - 1])}
                rows.append(row | {"rounds": int(rounds.sum()), "texts": len(rounds)})
    return rows


def _by_layer(curves: Sequence[Sequence[float]]) -> list[tuple[str | int, np.ndarray]]:
    layers = np.array(curves)
    return [("mean", layers.mean(axis=0)), *enumerate(layers)]


def _losses(sums: Mapping[str, np.ndarray], layer: str | int) -> Row:
    """Compute the columns of one layer, or of the mean of layers."""
    ratio = sums["errors"] / np.where(sums["outputs"] > 0, sums["outputs"], np.nan)
    pruned = sums["given_up"] / sums["rows"]
    chosen = slice(None) if layer == "mean" else slice(int(layer), int(layer) + 1)
    every, committed = ratio[chosen].mean(axis=0)
    row = {"error_all": _round(every), "error_committed": _round(committed), "given_up": _round(pruned[chosen].mean())}
    return row | {"rows": int(sums["rows"][0])}


def _forced(stats: Sequence[Mapping[str, Any]]) -> Row:
    """Average over sets, which have equal weight; counts are summed."""
    row = {}
    for column in ("kl", "top1"):
        by_text = [np.array(one[f"{column}_by_text"]) for one in stats]
        low, high = mean_interval(by_text)
        row |= {column: float(np.mean([values.mean() for values in by_text]))}
        row |= {f"{column}_low": low, f"{column}_high": high}
    row |= {column: float(np.mean([one[column] for one in stats])) for column in _MEANS}
    row = {column: _round(value) for column, value in row.items()}
    row |= {column: sum(one[column] for one in stats) for column in ("rounds", "positions")}
    return row | {"texts": sum(len(one["kl_by_text"]) for one in stats)}


def _ratio_interval(committed: np.ndarray, rounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the 95 % bootstrap interval over texts of each depth's share of rounds."""
    drawn = np.random.default_rng(0).integers(0, len(rounds), (DRAWS, len(rounds)))
    shares = committed[drawn].sum(axis=1) / rounds[drawn].sum(axis=1)[:, None]
    low, high = np.percentile(shares, [2.5, 97.5], axis=0)
    return low, high


def _round(value: float) -> float | None:
    """Round to six digits; None for NaN and infinities."""
    return round(float(value), 6) if np.isfinite(value) else None
