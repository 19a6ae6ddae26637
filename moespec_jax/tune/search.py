"""The search for the fastest setting within a bound on what it may lose.

A few settings are timed, and the cost of a round is fitted to them; acceptance of every tree comes from drafting once
at every position of the model's own continuations; what a budget loses, accepts and reads comes from following them.
So every candidate's speed is predicted, the best predicted are timed against plain decoding in turns, and the fastest
of those is chosen by what was measured.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import continued
from moespec_jax.measure.timing import TimingCase, spread, time_interleaved, tokens_per_second
from moespec_jax.runtime.model import Model
from moespec_jax.tune.candidates import (
    ANCHORS,
    BUDGETED_ANCHORS,
    EXACT_RULES,
    LOSSY_RULES,
    Candidate,
    budgeted_candidate,
    exact_candidates,
    trees_for_budgets,
)
from moespec_jax.tune.cost import Cost, Measured, fit, interpolate_experts
from moespec_jax.tune.replay import path_ranks

FINALISTS, BUDGETED_TREES, ANCHOR_REPEATS = 10, 4, 3
PLAIN = "plain"


class Bound(NamedTuple):
    """What may be lost: divergence in nats, share of first choices that are not the exact target's own; both None means
    nothing at all."""

    max_kl: float | None = None
    min_agreement: float | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing may be lost."""
        return self.max_kl is None and self.min_agreement is None

    def allows(self, candidate: Candidate) -> bool:
        """Whether a candidate's measured loss is within."""
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
    """A candidate that was timed: tokens a second, and over plain decoding of the same turns; medians and ranges."""

    candidate: Candidate
    tokens_per_s: dict[str, float]
    over_plain: dict[str, float]
    accept_length: float
    exact: bool


class Outcome(NamedTuple):
    """What the search found: `best` is None where plain decoding wins. Finalists by measured speed, the fastest first;
    `refused` counts candidates that lose more than they may."""

    best: Finalist | None
    finalists: list[Finalist]
    plain_tokens_per_s: dict[str, float]
    cost: Cost
    considered: int
    refused: int


def find_fastest(model: Model, prompts: Sequence[Sequence[int]], search: SearchConfig, ledger: Ledger) -> Outcome:
    """Find the fastest setting; every measurement goes through `ledger`."""
    measured = time_anchors(model, prompts, search, ledger)
    cost, experts = fit(measured), interpolate_experts([one for one in measured if not one.budgeted])
    longest = max(tree.depth for tree in search.trees) + 1
    texts: list[list[int]] = ledger.task("texts", lambda: continued(model, prompts, search.tokens + longest))
    ranks = draft_at_all_positions(model, texts, search, ledger)
    exact = exact_candidates(search.trees, ranks, experts, cost)
    budgeted = measure_budgets(model, texts, search, exact, cost, ledger)
    allowed = [c for c in budgeted if search.bound.allows(c)]
    best = sorted([*exact, *allowed], key=lambda c: -c.tokens_per_s)[:FINALISTS]
    plain, finalists = time_finalists(model, prompts, best, search, ledger)
    wins = finalists[0].tokens_per_s["median"] > plain["median"]
    considered, refused = len(exact) + len(budgeted), len(budgeted) - len(allowed)
    return Outcome(finalists[0] if wins else None, finalists, plain, cost, considered, refused)


def time_anchors(
    model: Model, prompts: Sequence[Sequence[int]], search: SearchConfig, ledger: Ledger
) -> list[Measured]:
    """Seconds a round of the settings that the cost is fitted to."""
    known = min(tree.top_k for tree in search.trees), max(tree.top_k for tree in search.trees)
    anchors = [tree for tree in ANCHORS if known[0] <= tree.top_k <= known[1]]
    cases = {tree.name: TimingCase(DecodingSpec(tree)) for tree in anchors}
    for tree in BUDGETED_ANCHORS:
        for budget in (min(search.budgets), max(search.budgets)):
            cases[f"{tree.name} B={budget}"] = TimingCase(DecodingSpec(tree, BudgetConfig(budget)))
    turns = time_interleaved(model, prompts, cases, search.tokens, ANCHOR_REPEATS, ledger, label="anchor")
    found = []
    for name, case in cases.items():
        assert isinstance(case.spec.tree, TreeConfig)
        seconds = spread([turn[name]["decode_s"] / turn[name]["rounds"] for turn in turns])["median"]
        experts = turns[0][name]["experts_read"]
        found.append(Measured(case.spec.tree, experts, seconds, case.spec.budget is not None))
    return found


def draft_at_all_positions(
    model: Model, texts: Sequence[Sequence[int]], search: SearchConfig, ledger: Ledger
) -> dict[int, np.ndarray]:
    """`replay.path_ranks` of every width that is searched."""
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
    """Candidates with a budget: exact rules where nothing may be lost, else lossy ones."""
    rules = EXACT_RULES if search.bound.exact else LOSSY_RULES
    trees = trees_for_budgets(exact, search.budgets, cost, 2 if search.bound.exact else BUDGETED_TREES)
    longest = max(tree.depth for tree in search.trees) + 1
    texts = [text[: len(text) - longest] for text in texts]
    found, total = [], model.config.num_experts
    with tqdm(total=len(trees) * len(rules), desc="budgets", unit="rule", disable=None) as bar:
        for tree in trees:
            forced: list[Texts] = []  # prefilled when it is needed
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
) -> tuple[dict[str, float], list[Finalist]]:
    """Plain decoding's speed and the candidates', the fastest first."""
    cases = {PLAIN: TimingCase(), **{c.name: TimingCase(c.spec) for c in best}}
    turns = time_interleaved(model, prompts, cases, search.tokens, search.repeats, ledger, label="final")
    finalists = [_finalist(c, turns) for c in best]
    return spread([tokens_per_second(turn[PLAIN]) for turn in turns]), sorted(
        finalists, key=lambda f: -f.tokens_per_s["median"]
    )


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
