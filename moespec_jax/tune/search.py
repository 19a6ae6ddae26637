"""Search for the fastest setting within a bound on its loss.

The cost of a round is fitted to a few timed settings (`cost.py`). The acceptance of every tree of an EAGLE-3 head comes
from drafting at every position of the model's own continuations (`replay.py`); the trees of other drafters, which are
few, are all timed instead. Loss, acceptance and experts of a budget come from teacher forcing of the continuations.
From this the speed of every candidate is predicted. The fastest predictions are timed in turns with plain decoding, and
the fastest measured setting is chosen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moespec_jax.checkpoint.head.read import LoadedDraft
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import continued
from moespec_jax.measure.timing import TimingCase, spread, time_interleaved, tokens_per_second
from moespec_jax.runtime.drafters import menu_of
from moespec_jax.runtime.model import Model
from moespec_jax.tune.candidates import (
    ANCHORS,
    BUDGETED_ANCHORS,
    EXACT_RULES,
    LOSSY_RULES,
    Candidate,
    budgeted_candidate,
    exact_candidates,
    timed_candidates,
    trees_for_budgets,
)
from moespec_jax.tune.cost import Cost, Measured, fit, interpolate_experts
from moespec_jax.tune.replay import path_ranks
from moespec_jax.tune.round_times import Timed, timed_rounds

FINALISTS, BUDGETED_TREES, ANCHOR_REPEATS = 10, 4, 3
PLAIN = "plain"


class Bound(NamedTuple):
    """Bound on the loss; without one, settings are exact.

    Fields:
        max_kl: largest mean divergence from the exact target, in nats.
        min_agreement: smallest share of positions whose most probable token is that of the exact target.
    """

    max_kl: float | None = None
    min_agreement: float | None = None

    @property
    def exact(self) -> bool:
        """True if no loss is allowed."""
        return self.max_kl is None and self.min_agreement is None

    def allows(self, candidate: Candidate) -> bool:
        """Test whether a candidate's measured loss is within the bound."""
        if candidate.loss is None:
            return True
        kl, top1 = candidate.loss["kl"], candidate.loss["top1"]
        within = self.max_kl is None or kl <= self.max_kl
        return within and (self.min_agreement is None or top1 >= self.min_agreement)


class SearchConfig(NamedTuple):
    """Search space and effort.

    Fields:
        bound: largest loss.
        trees: to search.
        budgets: numbers of experts a layer.
        tokens: new tokens of each prompt.
        repeats: turns of the final timing.
    """

    bound: Bound
    trees: Sequence[TreeConfig]
    budgets: Sequence[int]
    tokens: int
    repeats: int


class Finalist(NamedTuple):
    """Timed candidate.

    Fields:
        candidate: setting and predictions.
        tokens_per_s: median and range over turns.
        over_plain: speed over that of plain decoding in the same turn, median and range.
        accept_length: mean number of tokens that a round gains.
        exact: whether the output is exact.
    """

    candidate: Candidate
    tokens_per_s: dict[str, float]
    over_plain: dict[str, float]
    accept_length: float
    exact: bool


class Outcome(NamedTuple):
    """Result of a search.

    Fields:
        best: the fastest finalist; None if plain decoding is faster.
        finalists: by measured speed, the fastest first.
        plain_tokens_per_s: speed of plain decoding, median and range.
        cost: fitted cost model.
        considered: number of candidates.
        refused: number of candidates whose loss exceeds the bound.
        timed: rounds of every setting that was timed.
    """

    best: Finalist | None
    finalists: list[Finalist]
    plain_tokens_per_s: dict[str, float]
    cost: Cost
    considered: int
    refused: int
    timed: list[Timed]


def find_fastest(model: Model, prompts: Sequence[Sequence[int]], search: SearchConfig, ledger: Ledger) -> Outcome:
    """Find the fastest setting; all measurements are stored in `ledger`."""
    measured, anchors = time_anchors(model, prompts, search, ledger)
    cost, experts = fit(measured), interpolate_experts([one for one in measured if not one.budgeted])
    longest = max(tree.depth for tree in search.trees) + 1
    texts: list[list[int]] = ledger.task("texts", lambda: continued(model, prompts, search.tokens + longest))
    if isinstance(model.draft, LoadedDraft):
        ranks = draft_at_all_positions(model, texts, search, ledger)
        exact = exact_candidates(search.trees, ranks, experts, cost)
    else:
        exact = _timed_trees(search.trees, measured, anchors)
    budgeted = measure_budgets(model, texts, search, exact, cost, ledger)
    allowed = [c for c in budgeted if search.bound.allows(c)]
    best = sorted([*exact, *allowed], key=lambda c: -c.tokens_per_s)[:FINALISTS]
    plain, finalists, timed = time_finalists(model, prompts, best, search, ledger)
    faster = finalists[0].tokens_per_s["median"] > plain["median"]
    considered, refused = len(exact) + len(budgeted), len(budgeted) - len(allowed)
    found = finalists[0] if faster else None
    return Outcome(found, finalists, plain, cost, considered, refused, anchors + timed)


def time_anchors(
    model: Model, prompts: Sequence[Sequence[int]], search: SearchConfig, ledger: Ledger
) -> tuple[list[Measured], list[Timed]]:
    """Time the settings that the cost of a round is fitted to, and those that a profile's costs must have: plain
    decoding and the trees of the menu."""
    anchors, budgeted = anchors_of(model, search.trees)
    cases = {PLAIN: TimingCase(), **{tree.name: TimingCase(DecodingSpec(tree)) for tree in anchors}}
    for tree in budgeted:
        for budget in (min(search.budgets), max(search.budgets)):
            cases[f"{tree.name} B={budget}"] = TimingCase(DecodingSpec(tree, BudgetConfig(budget)))
    turns = time_interleaved(model, prompts, cases, search.tokens, ANCHOR_REPEATS, ledger, label="anchor")
    timed = timed_rounds(cases, turns)
    found = []
    for name, one in zip(cases, timed, strict=True):
        if isinstance(one.spec.tree, TreeConfig):
            seconds, experts = spread(one.seconds)["median"], turns[0][name]["experts_read"]
            found.append(Measured(one.spec.tree, experts, seconds, one.spec.budget is not None))
    return found, timed


def anchors_of(model: Model, trees: Sequence[TreeConfig]) -> tuple[list[TreeConfig], list[TreeConfig]]:
    """Choose the trees to time without and with budgets: a few of an EAGLE-3 head, all of another drafter; and those of
    the menu."""
    menu = menu_of(model.draft)
    if not isinstance(model.draft, LoadedDraft):
        by_size = sorted(trees, key=lambda tree: tree.size)
        return [*trees, *menu], list(dict.fromkeys((by_size[len(by_size) // 2], by_size[-1])))
    narrowest, widest = min(tree.top_k for tree in trees), max(tree.top_k for tree in trees)
    return [tree for tree in (*ANCHORS, *menu) if narrowest <= tree.top_k <= widest], BUDGETED_ANCHORS


def _timed_trees(trees: Sequence[TreeConfig], measured: Sequence[Measured], timed: Sequence[Timed]) -> list[Candidate]:
    """Make candidates of trees that are among the anchors, by their seconds, experts and tokens a round."""
    own = {one.tree: one for one in measured if not one.budgeted}
    gained = {one.spec.tree: one.tokens[0] for one in timed if one.spec.budget is None}
    return timed_candidates({tree: (gained[tree], own[tree].experts, own[tree].round_s) for tree in trees})


def draft_at_all_positions(
    model: Model, texts: Sequence[Sequence[int]], search: SearchConfig, ledger: Ledger
) -> dict[int, np.ndarray]:
    """Compute `replay.path_ranks` of every width in the search space."""
    depths: dict[int, int] = {}
    for tree in search.trees:
        depths[tree.top_k] = max(depths.get(tree.top_k, 0), tree.depth)
    prompts = [len(text) - search.tokens - max(depths.values()) - 1 for text in texts]
    ranks = {}
    for top_k, depth in tqdm(depths.items(), desc="drafting", unit="width", disable=None):
        make = lambda: path_ranks(model, texts, prompts, depth, top_k, search.tokens - 1).tolist()  # noqa: B023, E731
        ranks[top_k] = np.array(ledger.task(f"ranks of top-k {top_k}", make), np.int64)
    return ranks


def measure_budgets(
    model: Model,
    texts: Sequence[Sequence[int]],
    search: SearchConfig,
    exact: Sequence[Candidate],
    cost: Cost,
    ledger: Ledger,
) -> list[Candidate]:
    """Measure loss, acceptance and experts of budgets, with exact rules if no loss is allowed, else with lossy ones."""
    rules = EXACT_RULES if search.bound.exact else LOSSY_RULES
    trees = trees_for_budgets(exact, search.budgets, cost, 2 if search.bound.exact else BUDGETED_TREES)
    longest = max(tree.depth for tree in search.trees) + 1
    texts = [text[: len(text) - longest] for text in texts]
    found, total = [], model.config.num_experts
    with tqdm(total=len(trees) * len(rules), desc="budgets", unit="rule", disable=None) as bar:
        for tree in trees:
            forced: list[Texts] = []  # prefilled only if the ledger lacks a value
            for rule_name, rule in rules.items():
                for budget in search.budgets:
                    key = f"loss of {tree.name}, {rule_name}, {budget}"
                    if key not in ledger:
                        if not forced:
                            forced = [Texts(model, tree, texts, [len(t) - search.tokens for t in texts])]
                        ledger.put(key, summary(forced[0].teacher_force(BudgetConfig(total, **rule), budget)))
                    config = BudgetConfig(budget, **rule)
                    found.append(budgeted_candidate(tree, rule_name, config, ledger.get(key), cost))
                bar.update()
    return found


def time_finalists(
    model: Model, prompts: Sequence[Sequence[int]], best: Sequence[Candidate], search: SearchConfig, ledger: Ledger
) -> tuple[dict[str, float], list[Finalist], list[Timed]]:
    """Time plain decoding and the candidates in turns; returns the speed of plain decoding, the finalists, the fastest
    first, and the rounds of each."""
    cases = {PLAIN: TimingCase(), **{c.name: TimingCase(c.spec) for c in best}}
    turns = time_interleaved(model, prompts, cases, search.tokens, search.repeats, ledger, label="final")
    finalists = [_finalist(c, turns) for c in best]
    finalists.sort(key=lambda finalist: -finalist.tokens_per_s["median"])
    plain = spread([tokens_per_second(turn[PLAIN]) for turn in turns])
    return plain, finalists, timed_rounds(cases, turns)


def _finalist(candidate: Candidate, turns: Sequence[dict[str, Any]]) -> Finalist:
    own = [turn[candidate.name] for turn in turns]
    over = [tokens_per_second(one) / tokens_per_second(turn[PLAIN]) for one, turn in zip(own, turns, strict=True)]
    return Finalist(
        candidate,
        spread([tokens_per_second(one) for one in own]),
        spread(over),
        own[0]["accept_length"],
        own[0]["exact"],
    )
