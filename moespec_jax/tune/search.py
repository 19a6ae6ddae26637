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
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import continued
from moespec_jax.measure.timing import Setting, speed, spread, take_turns, tree_name
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


class Asked(NamedTuple):
    """What is searched, and on how much: trees, numbers of experts a layer, new tokens a prompt, turns of the end."""

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


def search(model: Model, prompts: Sequence[Sequence[int]], asked: Asked, ledger: Ledger) -> Outcome:
    """Find the fastest setting; every measurement goes through `ledger`."""
    measured = time_anchors(model, prompts, asked, ledger)
    cost, experts = fit(measured), interpolate_experts([one for one in measured if not one.budgeted])
    longest = max(tree.depth for tree in asked.trees) + 1
    texts: list[list[int]] = ledger.piece("texts", lambda: continued(model, prompts, asked.tokens + longest))
    ranks = draft_everywhere(model, texts, asked, ledger)
    exact = exact_candidates(asked.trees, ranks, experts, cost)
    budgeted = follow_budgets(model, texts, asked, exact, cost, ledger)
    allowed = [c for c in budgeted if asked.bound.allows(c)]
    best = sorted([*exact, *allowed], key=lambda c: -c.tokens_per_s)[:FINALISTS]
    plain, finalists = time_finalists(model, prompts, best, asked, ledger)
    wins = finalists[0].tokens_per_s["median"] > plain["median"]
    considered, refused = len(exact) + len(budgeted), len(budgeted) - len(allowed)
    return Outcome(finalists[0] if wins else None, finalists, plain, cost, considered, refused)


def time_anchors(model: Model, prompts: Sequence[Sequence[int]], asked: Asked, ledger: Ledger) -> list[Measured]:
    """Seconds a round of the settings that the cost is fitted to."""
    known = min(tree.top_k for tree in asked.trees), max(tree.top_k for tree in asked.trees)
    anchors = [tree for tree in ANCHORS if known[0] <= tree.top_k <= known[1]]
    settings = {tree_name(tree): Setting(tree) for tree in anchors}
    for tree in BUDGETED_ANCHORS:
        for budget in (min(asked.budgets), max(asked.budgets)):
            settings[f"{tree_name(tree)} B={budget}"] = Setting(tree, BudgetConfig(budget))
    turns = take_turns(model, prompts, settings, asked.tokens, ANCHOR_REPEATS, ledger, label="anchor")
    found = []
    for name, setting in settings.items():
        assert setting.tree is not None
        seconds = spread([turn[name]["decode_s"] / turn[name]["rounds"] for turn in turns])["median"]
        experts = turns[0][name]["experts_loaded"]
        found.append(Measured(setting.tree, experts, seconds, setting.budget is not None))
    return found


def draft_everywhere(
    model: Model, texts: Sequence[Sequence[int]], asked: Asked, ledger: Ledger
) -> dict[int, np.ndarray]:
    """`replay.path_ranks` of every width that is searched."""
    depths: dict[int, int] = {}
    for tree in asked.trees:
        depths[tree.top_k] = max(depths.get(tree.top_k, 0), tree.depth)
    prompts = [len(text) - asked.tokens - max(depths.values()) - 1 for text in texts]
    ranks = {}
    for top_k, depth in tqdm(depths.items(), desc="drafting", unit="width", disable=None):
        make = lambda: path_ranks(model, texts, prompts, depth, top_k, asked.tokens - 1).tolist()  # noqa: B023, E731
        ranks[top_k] = np.array(ledger.piece(f"ranks of top-k {top_k}", make), np.int64)
    return ranks


def follow_budgets(
    model: Model, texts: Sequence[Sequence[int]], asked: Asked, exact: Sequence[Candidate], cost: Cost, ledger: Ledger
) -> list[Candidate]:
    """Candidates with a budget: exact rules where nothing may be lost, else lossy ones."""
    rules = EXACT_RULES if asked.bound.exact else LOSSY_RULES
    trees = trees_for_budgets(exact, asked.budgets, cost, 2 if asked.bound.exact else BUDGETED_TREES)
    longest = max(tree.depth for tree in asked.trees) + 1
    texts = [text[: len(text) - longest] for text in texts]
    found, total = [], model.config.num_experts
    with tqdm(total=len(trees) * len(rules), desc="budgets", unit="rule", disable=None) as bar:
        for tree in trees:
            following: list[Texts] = []  # made when something has to be followed
            for rule_name, rule in rules.items():
                for budget in asked.budgets:
                    key = f"loss of {tree_name(tree)}, {rule_name}, {budget}"
                    if key not in ledger:
                        if not following:
                            following = [Texts(model, tree, texts, [len(t) - asked.tokens for t in texts])]
                        ledger.put(key, summary(following[0].follow(BudgetConfig(total, **rule), budget)))
                    config = BudgetConfig(budget, **rule)
                    found.append(budgeted_candidate(tree, rule_name, config, ledger.get(key), cost))
                bar.update()
    return found


def time_finalists(
    model: Model, prompts: Sequence[Sequence[int]], best: Sequence[Candidate], asked: Asked, ledger: Ledger
) -> tuple[dict[str, float], list[Finalist]]:
    """Plain decoding's speed and the candidates', the fastest first."""
    settings = {PLAIN: Setting(), **{c.name: c.setting for c in best}}
    turns = take_turns(model, prompts, settings, asked.tokens, asked.repeats, ledger, label="final")
    finalists = [_finalist(c, turns) for c in best]
    return spread([speed(turn[PLAIN]) for turn in turns]), sorted(finalists, key=lambda f: -f.tokens_per_s["median"])


def _finalist(candidate: Candidate, turns: Sequence[dict[str, Any]]) -> Finalist:
    own = [turn[candidate.name] for turn in turns]
    over = [speed(one) / speed(turn[PLAIN]) for one, turn in zip(own, turns, strict=True)]
    return Finalist(
        candidate, spread([speed(one) for one in own]), spread(over), own[0]["accept_length"], own[0]["exact"]
    )
