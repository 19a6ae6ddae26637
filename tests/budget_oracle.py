"""Expert budgets as the papers describe them, in plain Python and float64: one layer, row by row, expert by expert."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moespec_jax.decoding.budget_config import BudgetConfig


@dataclasses.dataclass
class Rows:
    """A pass's rows, tree by tree and flattened: which count at all, the draft's chance of each, its depth, the rows on
    its way from the root (itself included), and how many rows of its tree share its depth."""

    valid: Sequence[bool]
    chance: Sequence[float]
    depth: Sequence[int]
    ancestors: Sequence[Sequence[int]]
    peers: Sequence[int]
    committed: Sequence[float]


@dataclasses.dataclass
class Outcome:
    """`weights[t]` maps the experts that row t goes to, to their weights."""

    shortlist: list[int]
    weights: list[dict[int, float]]
    mass_kept: float
    replaced: list[bool]
    live: list[bool]
    closest: float  # the smallest difference that decided anything, relative to the values compared


def softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    masses = np.exp(wide - wide.max(axis=1, keepdims=True))
    return masses / masses.sum(axis=1, keepdims=True)


def restrict(rule: BudgetConfig, bound: int, logits: np.ndarray, k: int, norm: bool, rows: Rows) -> Outcome:
    """One layer under `rule`, of which at most `bound` experts may be read."""
    g = softmax(logits)
    tokens, total = g.shape
    own = [best(g[t], range(total), k) if rows.valid[t] else [] for t in range(tokens)]
    natural = [normalised({e: g[t, e] for e in own[t]}, norm) for t in range(tokens)]
    scores = [
        math.fsum(say(rule, rows, t) * credit(rule, g[t, e], natural[t].get(e)) for t in valid(rows))
        for e in range(total)
    ]
    first = [precedence(rule, rows, own, e) for e in range(total)]
    order = sorted(range(total), key=lambda e: (-first[e], -scores[e], e))
    ranked = [scores[e] for e in order]
    count = min(max(size(rule, ranked), k), bound)
    shortlist = in_groups(rule, order, count)
    weights, live, replaced = [], [], []
    for t in range(tokens):
        kept = sum(natural[t][e] for e in own[t] if e in shortlist)
        lost = any(e not in shortlist for e in own[t])
        least = rule.min_kept_weight
        stays = rows.depth[t] == 0 or least == 0
        stays = stays or (not lost if least == 1 else kept >= least * sum(natural[t].values()))
        live.append(rows.valid[t] and stays)
        replaced.append(lost)
        goes = [e for e in own[t] if e in shortlist] if rule.coverage == "truncate" else best(g[t], shortlist, k)
        weights.append(normalised({e: g[t, e] for e in goes}, norm) if norm else {e: g[t, e] for e in goes})
    live = [all(live[a] for a in rows.ancestors[t]) for t in range(tokens)]
    weights = [weights[t] if live[t] else {} for t in range(tokens)]
    mass_kept = math.fsum(scores[e] for e in shortlist) / (math.fsum(scores) or 1.0)
    # In groups, ranks decide far below the number of experts used.
    deep = count if rule.groups == 1 else total
    gaps = [gap(first, ranked, order, deep), *(token_gap(g[t], own[t], shortlist, k) for t in valid(rows))]
    return Outcome(shortlist, weights, mass_kept, replaced, live, min(gaps))


def in_groups(rule: BudgetConfig, order: list[int], count: int) -> list[int]:
    """Of the ranked experts, an equal number of the best of each group of consecutive ones: the first of every group,
    the second of every group, and so on."""
    size, each = len(order) // rule.groups, math.ceil(count / rule.groups)
    best = [[e for e in order if e // size == group][:each] for group in range(rule.groups)]
    return [one[place] for place in range(each) for one in best]


def valid(rows: Rows) -> list[int]:
    return [t for t, ok in enumerate(rows.valid) if ok]


def best(row: np.ndarray, among: Sequence[int], k: int) -> list[int]:
    return sorted(among, key=lambda e: (-row[e], e))[:k]


def normalised(weights: dict[int, float], norm: bool) -> dict[int, float]:
    total = math.fsum(weights.values())
    return {e: w / total for e, w in weights.items()} if norm and total > 0 else weights


def say(rule: BudgetConfig, rows: Rows, t: int) -> float:
    if rule.score == "probability":
        return 1.0
    if rule.score == "path":
        return rows.chance[t]
    return rows.committed[rows.depth[t]] / math.sqrt(rows.peers[t])


def credit(rule: BudgetConfig, probability: float, weight: float | None) -> float:
    if rule.credit == "all":
        return probability
    if weight is None:
        return 0.0
    return probability if rule.credit == "hits" else weight**2


def precedence(rule: BudgetConfig, rows: Rows, own: list[list[int]], expert: int) -> float:
    """Of the first anchored row that chose the expert; roots come before all others, however sure the draft is of
    those."""
    found = [0.0]
    for t in valid(rows):
        root = rows.depth[t] == 0
        likely = rule.anchor == "likely" and rows.chance[t] >= rule.anchor_probability
        if expert in own[t] and (likely or (rule.anchor == "root" and root)):
            found.append(rows.chance[t] + 1.0 if root else rows.chance[t])
    return max(found)


def size(rule: BudgetConfig, ranked: list[float]) -> int:
    total = math.fsum(ranked)
    if rule.size == "fixed":
        return len(ranked)
    if rule.size == "mass":
        held = np.cumsum(ranked)
        return 1 + int(np.sum(held < rule.mass * held[-1]))
    shares = [s / (total or 1.0) for s in ranked]
    return math.ceil(math.exp(-math.fsum(s * math.log(s) for s in shares if s > 0)))


def gap(first: list[float], ranked: list[float], order: list[int], count: int) -> float:
    """How close two neighbours of equal precedence are in rank, up to the shortlist's end, without being equal."""
    found = [1.0]
    for i in range(min(count, len(order) - 1)):
        a, b = ranked[i], ranked[i + 1]
        if first[order[i]] == first[order[i + 1]] and a > 0 and a != b:
            found.append((a - b) / a)
    return min(found)


def token_gap(row: np.ndarray, own: list[int], shortlist: list[int], k: int) -> float:
    """How close the last expert taken and the first one left are, of all and of the shortlist."""
    found = [1.0]
    for among in (range(len(row)), shortlist):
        ranked = sorted((float(row[e]) for e in among), reverse=True)
        if len(ranked) > k and ranked[k - 1] != ranked[k]:
            found.append((ranked[k - 1] - ranked[k]) / ranked[k - 1])
    return min(found)
