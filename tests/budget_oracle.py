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


@dataclasses.dataclass
class Sigmoid:
    """A sigmoid router: what is added to each expert's score for the choice, groups of which a token may use some, and
    the factor on its weights."""

    correction: Sequence[float]
    groups: int = 1
    groups_per_tok: int = 1
    scale: float = 1.0


def rank_scores(gates: np.ndarray, router: Sigmoid) -> np.ndarray:
    """Scores by which experts are ranked, row by row; groups that a token may not use come after all others."""
    scores, size = gates + np.asarray(router.correction, np.float64), gates.shape[1] // router.groups
    for row in scores:
        strength = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(router.groups)]
        lowest = min(row) - max(row) - 1.0
        for g in sorted(range(router.groups), key=lambda g: (-strength[g], g))[router.groups_per_tok :]:
            row[g * size : (g + 1) * size] += lowest
    return scores


def restrict(
    rule: BudgetConfig, bound: int, logits: np.ndarray, k: int, norm: bool, rows: Rows, router: Sigmoid | None = None
) -> Outcome:
    """One layer under `rule`, of which at most `bound` experts may be read."""
    g = p = r = softmax(logits)
    if router is not None:
        g = 1.0 / (1.0 + np.exp(-np.asarray(logits, np.float64)))
        p, r = g / g.sum(axis=1, keepdims=True), rank_scores(g, router)
    scale = 1.0 if router is None else router.scale
    tokens, total = g.shape
    own = [best(r[t], range(total), k) if rows.valid[t] else [] for t in range(tokens)]
    natural = [normalised({e: g[t, e] for e in own[t]}, norm, scale) for t in range(tokens)]
    scores = [
        math.fsum(say(rule, rows, t) * credit(rule, p[t, e], natural[t].get(e)) for t in valid(rows))
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
        goes = [e for e in own[t] if e in shortlist] if rule.coverage == "truncate" else best(r[t], shortlist, k)
        weights.append(normalised({e: g[t, e] for e in goes}, norm, scale))
    live = [all(live[a] for a in rows.ancestors[t]) for t in range(tokens)]
    weights = [weights[t] if live[t] else {} for t in range(tokens)]
    mass_kept = math.fsum(scores[e] for e in shortlist) / (math.fsum(scores) or 1.0)
    # In groups, ranks decide far below the number of experts used.
    deep = count if rule.groups == 1 else total
    gaps = [gap(first, ranked, order, deep), *(token_gap(r[t], own[t], shortlist, k) for t in valid(rows))]
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


def normalised(weights: dict[int, float], norm: bool, scale: float = 1.0) -> dict[int, float]:
    total = math.fsum(weights.values())
    return {e: scale * (w / total if norm and total > 0 else w) for e, w in weights.items()}


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
            found.append((ranked[k - 1] - ranked[k]) / abs(ranked[k - 1] or 1.0))
    return min(found)
