"""Rules of an expert budget, by the names that studies and their results use."""

from collections.abc import Sequence
from typing import Any

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.budget_config import BudgetConfig, is_exact, resolve
from moespec_jax.errors import RequestError

# MoE-Spec's own rule (arXiv:2602.16052), the baseline of all comparisons.
PAPER = "MoE-Spec (probability, all)"
_UNIFORM = dict(score="probability", credit="all")
_ALL_OWN: dict[str, Any] = dict(anchor="likely", anchor_probability=0.0)
# Fields of `BudgetConfig` that each rule sets; the others keep their defaults.
RULES: dict[str, dict[str, Any]] = {
    PAPER: _UNIFORM,
    "MoE-Spec, truncate": _UNIFORM | dict(coverage="truncate"),
    "probability, hits": dict(score="probability", credit="hits"),
    "path, all": dict(score="path", credit="all"),
    "path, hits": dict(score="path", credit="hits"),
    "path, hits, anchor root": dict(score="path", credit="hits", anchor="root"),
    "depth, hits, anchor root (AcceptMoE)": dict(score="depth", credit="hits", anchor="root"),
    "path, hits, guarantee 0.5 (OEA)": dict(score="path", credit="hits", anchor="likely"),
    "path, squares (default)": {},
    "path, squares, truncate": dict(coverage="truncate"),
    "path, squares, faithfulness 0.3": dict(anchor="root", min_kept_weight=0.3),
    "path, squares, faithfulness 0.5": dict(anchor="root", min_kept_weight=0.5),
    "path, squares, guarantee 0, faithfulness 0.5": _ALL_OWN | dict(min_kept_weight=0.5),
    "path, squares, guarantee 0, faithfulness 1 (exact)": _ALL_OWN | dict(min_kept_weight=1.0),
}
# Rules that are compared, and rules that are timed, by default.
FEW = [
    PAPER,
    "depth, hits, anchor root (AcceptMoE)",
    "path, hits, guarantee 0.5 (OEA)",
    "path, squares (default)",
    "path, squares, faithfulness 0.5",
    "path, squares, guarantee 0, faithfulness 1 (exact)",
]
TIMED = [PAPER, "path, squares (default)", "path, squares, faithfulness 0.5"]
# Default budgets, as fractions of the experts.
SHARES = (3 / 16, 1 / 4, 3 / 8, 1 / 2)


def named_rules(names: Sequence[str], few: Sequence[str]) -> list[str]:
    """Expand `few` and `all` and add MoE-Spec's own rule; names are returned in the order of `RULES`.

    Raises:
        RequestError: there is no such rule.
    """
    groups = {"few": list(few), "all": list(RULES)}
    requested = {PAPER}.union(*(groups.get(name, [name]) for name in names))
    if unknown := requested - set(RULES):
        raise RequestError(f"expected rules of few, all, {', '.join(map(repr, RULES))}; got {sorted(unknown)[0]!r}")
    return [name for name in RULES if name in requested]


def rule_of(name: str, budget: int) -> BudgetConfig:
    """Build the budget of a named rule with at most `budget` experts a layer."""
    return BudgetConfig(budget, **RULES[name])


def mark(name: str, budget: int, config: DecoderConfig) -> str:
    """Classify the output of one sequence under a rule and budget: `exact` or `lossy`."""
    return "exact" if is_exact(resolve(rule_of(name, budget), config), config, 1) else "lossy"


def keeps_all(name: str) -> bool:
    """Test whether a rule prunes no drafted token."""
    return not rule_of(name, 1).prunes


def default_budgets(config: DecoderConfig) -> list[int]:
    """Compute `SHARES` of a model's experts, none below the number of experts of one token."""
    experts = config.num_experts
    return sorted({max(config.num_experts_per_tok, round(share * experts)) for share in SHARES})
