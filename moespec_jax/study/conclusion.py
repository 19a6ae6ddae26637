"""Findings of a study, as rows and as sentences: the best rule at half and at a quarter of the experts."""

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

# Texts that rules are compared on: names of sets, each with a kind of text.
_Subject = list[tuple[str, str]]


def finding_budgets(config: DecoderConfig, plan: Plan) -> list[int]:
    """Select half and a quarter of the experts as far as they were measured; if neither was, all budgets."""
    preferred = [config.num_experts // 2, config.num_experts // 4]
    return [budget for budget in preferred if budget in plan.budgets] or list(reversed(plan.budgets))


def subjects(sets: Sequence[str]) -> dict[str, _Subject]:
    """List the texts that rules are compared on: the own texts of all sets together, if there are several sets, then
    every kind of text of every set alone."""
    each = {f"{name}, {kind}": [(name, kind)] for name in sets for kind in kinds(name)}
    joint = {f"{ALL}, {OWN}": [(name, OWN) for name in sets]} if len(sets) > 1 else {}
    return joint | each


def finding_rows(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Row]:
    """Compare every rule with MoE-Spec's own, and the best rule that prunes nothing with the second best."""
    rows = []
    for over, texts in subjects(sets).items():
        for budget in finding_budgets(config, plan):
            by_rule = _divergences(plan, texts, budget, ledger)
            pairs = [(rule, PAPER) for rule in plan.rules if rule != PAPER]
            found = _standing_without_pruning(plan, by_rule)
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
    """Findings at one budget, in words.

    Fields:
        whole: over all sets, or over the only one.
        each: over every kind of text of every set.
    """

    whole: str
    each: list[str]


def findings(config: DecoderConfig, plan: Plan, sets: Sequence[str], ledger: Ledger) -> list[Finding]:
    """Summarise the comparison at each of `finding_budgets`."""
    return [_finding(config, plan, sets, budget, ledger) for budget in finding_budgets(config, plan)]


def _finding(config: DecoderConfig, plan: Plan, sets: Sequence[str], budget: int, ledger: Ledger) -> Finding:
    sentences = []
    for over, texts in subjects(sets).items():
        by_rule = _divergences(plan, texts, budget, ledger)
        found = _standing_without_pruning(plan, by_rule)
        sentences.append(f"{over} ({found.against_paper.texts} texts): {standing_sentence(found, PAPER)}")
        if len(sentences) == 1:
            sentences[0] += _pruning_sentences(config, plan, texts, budget, by_rule, ledger)
    head = f"B = {budget} of {config.num_experts} experts, among rules that prune no drafted token; "
    return Finding(head + sentences[0], sentences[1:])


def _standing_without_pruning(plan: Plan, by_rule: Mapping[str, ByText]) -> Standing:
    return standing(by_rule, PAPER, [rule for rule in plan.rules if keeps_all(rule)])


def _pruning_sentences(
    config: DecoderConfig, plan: Plan, texts: _Subject, budget: int, by_rule: Mapping[str, ByText], ledger: Ledger
) -> str:
    """Summarise the rules that prune drafted tokens: the best lossy one, and those that are exact."""
    sentences = ""
    without = _accept_length(texts, None, ledger)
    lossy = [rule for rule in plan.rules if not keeps_all(rule) and mark(rule, budget, config) == "lossy"]
    if lossy:
        found = standing(by_rule, PAPER, lossy)
        length = _accept_length(texts, (found.best, budget), ledger)
        sentences += (
            f" Of the rules that prune drafted tokens, “{found.best}” diverges {nats(found.against_paper.kl)}:"
            f" {more(found.against_paper)}. It gains {length:.2f} tokens a round; without a budget, {without:.2f}."
        )
    for rule in plan.rules:
        if not keeps_all(rule) and mark(rule, budget, config) == "exact":
            length = _accept_length(texts, (rule, budget), ledger)
            sentences += f" “{rule}” is exact and gains {length:.2f} tokens a round."
    return sentences


def _divergences(plan: Plan, texts: _Subject, budget: int, ledger: Ledger) -> dict[str, ByText]:
    """Return each rule's divergences by text: one array for each set."""
    return {
        rule: [np.array(ledger.get(forced_key(*text, rule, budget))["kl_by_text"]) for text in texts]
        for rule in plan.rules
    }


def _accept_length(texts: _Subject, under: tuple[str, int] | None, ledger: Ledger) -> float:
    """Compute the mean number of tokens that a round gains; sets have equal weight."""
    keys = [exact_key(*text) if under is None else forced_key(*text, *under) for text in texts]
    return round(float(np.mean([ledger.get(key)["accept_length"] for key in keys])), 3)
