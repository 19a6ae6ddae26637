"""What a study found, as rows and as sentences: the best rule at half and a quarter of the experts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moespec_jax.config import DecoderConfig
from moespec_jax.measure.ledger import Ledger
from moespec_jax.study.finding import (
    ByText,
    Standing,
    contrast,
    contrast_row,
    more,
    nats,
    standing,
    standing_sentence,
)
from moespec_jax.study.measure import OWN, Plan, exact_key, forced_key, kinds
from moespec_jax.study.rows import ALL, Row
from moespec_jax.study.rules import PAPER, keeps_all, mark

_Subject = list[tuple[str, str]]


def finding_budgets(config: DecoderConfig, plan: Plan) -> list[int]:
    """Half and a quarter of the experts, as far as they were measured; else all budgets that were."""
    asked = [config.num_experts // 2, config.num_experts // 4]
    return [budget for budget in asked if budget in plan.budgets] or list(reversed(plan.budgets))


def subjects(sets: Sequence[str]) -> dict[str, _Subject]:
    """What rules are compared over: own texts of all sets together, if there are several, and every text by itself."""
    each = {f"{name}, {kind}": [(name, kind)] for name in sets for kind in kinds(name)}
    together = {f"{ALL}, {OWN}": [(name, OWN) for name in sets]} if len(sets) > 1 else {}
    return together | each


def finding_rows(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """Every rule against MoE-Spec's own, and the best of those that keep all drafted tokens against the next."""
    rows = []
    for over, texts in subjects(sets).items():
        for budget in finding_budgets(config, plan):
            by_rule = _divergences(plan, texts, budget, ledger)
            pairs = [(rule, PAPER) for rule in plan.rules if rule != PAPER]
            found = _standing_of_keepers(plan, by_rule)
            if found.runner_up not in (None, PAPER):
                pairs.append((found.best, found.runner_up))
            for rule, against in pairs:
                row = {"over": over, "budget": budget, "rule": rule, "output": mark(rule, budget, config)}
                row |= {"keeps_all_drafts": keeps_all(rule), "best": rule == found.best, "against": against}
                row |= contrast_row(contrast(by_rule[rule], by_rule[against]))
                lengths = {"accept_length": _accept_length(texts, (rule, budget), ledger)}
                rows.append(row | lengths | {"accept_length_exact": _accept_length(texts, None, ledger)})
    return rows


class Finding(NamedTuple):
    """Of one budget: what was found over all sets, or the only one, and on every text, in words."""

    whole: str
    each: list[str]


def findings(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Finding]:
    """One for each budget."""
    return [_finding(config, plan, sets, budget, ledger) for budget in finding_budgets(config, plan)]


def _finding(config: DecoderConfig, plan: Plan, sets: Sequence[str], budget: int, ledger: Ledger) -> Finding:
    said = []
    for over, texts in subjects(sets).items():
        by_rule = _divergences(plan, texts, budget, ledger)
        found = _standing_of_keepers(plan, by_rule)
        said.append(f"{over} ({found.against_paper.texts} texts): {standing_sentence(found, PAPER)}")
        if len(said) == 1:
            said[0] += _giving_up(config, plan, texts, budget, by_rule, ledger)
    head = f"B = {budget} of {config.num_experts} experts, rules that keep every drafted token, "
    return Finding(head + said[0], said[1:])


def _standing_of_keepers(plan: Plan, by_rule: Mapping[str, ByText]) -> Standing:
    return standing(by_rule, PAPER, [rule for rule in plan.rules if keeps_all(rule)])


def _giving_up(
    config: DecoderConfig, plan: Plan, texts: _Subject, budget: int, by_rule: Mapping[str, ByText], ledger: Ledger
) -> str:
    """What the rules that give up drafted tokens add, in words."""
    said = ""
    without = _accept_length(texts, None, ledger)
    lossy = [rule for rule in plan.rules if not keeps_all(rule) and mark(rule, budget, config) == "lossy"]
    if lossy:
        found = standing(by_rule, PAPER, lossy)
        length = _accept_length(texts, (found.best, budget), ledger)
        said += (
            f" Of the rules that give up drafted tokens, “{found.best}” diverges {nats(found.against_paper.kl)}:"
            f" {more(found.against_paper)}. It gains {length:.2f} tokens a round, no budget {without:.2f}."
        )
    for rule in plan.rules:
        if not keeps_all(rule) and mark(rule, budget, config) == "exact":
            said += f" “{rule}” loses nothing and gains {_accept_length(texts, (rule, budget), ledger):.2f}."
    return said


def _divergences(plan: Plan, texts: _Subject, budget: int, ledger: Ledger) -> dict[str, ByText]:
    """Of every rule, the divergence of every text, set by set."""
    return {
        rule: [np.array(ledger.get(forced_key(*text, rule, budget))["kl_by_text"]) for text in texts]
        for rule in plan.rules
    }


def _accept_length(texts: _Subject, under: tuple[str, int] | None, ledger: Ledger) -> float:
    """Tokens a round gains, every set counting as much as another."""
    keys = [exact_key(*text) if under is None else forced_key(*text, *under) for text in texts]
    return round(float(np.mean([ledger.get(key)["accept_length"] for key in keys])), 3)
