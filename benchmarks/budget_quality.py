"""Effect of a budget on the embedded target's distribution, by rule and size of the budget:

    python -m benchmarks.budget_quality --out benchmarks/results

Texts are pieces of held-out modules, and the target's own greedy continuations of their beginnings, run
token by token as `moespec_jax/measure/teacher_forcing.py` describes. Figures are means over positions, and intervals
95 % of a bootstrap over texts.

`accept_length` counts tokens a round gains: on held-out text that is how well the head guesses the text, on the
target's own how much greedy decoding would accept. A rule that prunes rows ("faithfulness") lowers it: pruned rows are
not committed.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moespec_jax.cli.command import use_compilation_cache
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.prompt_sets import PIECE, continued, held_out_pieces
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions
from moespec_jax.study.rules import PAPER, RULES

TREE = TreeConfig(7, 10, 60)
# Rules that choose the number of experts by the scores; the budget is its upper bound.
SIZED: dict[str, dict[str, Any]] = {
    "MoE-Spec, mass 0.6": RULES[PAPER] | dict(size="mass", mass=0.6),
    "path, squares, mass 0.9": dict(size="mass", mass=0.9),
    "path, squares, rank": dict(size="rank"),
}
# Of these, the ones that are run through the target's own text too.
OWN = [name for name in RULES if name.startswith(("MoE-Spec (", "path, hits", "path, squares"))]


def main() -> int:
    """Measure every rule at every budget on both kinds of text, and write `budget_quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write budget_quality.json to (default: print)")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=112, help="of each text, after its prompt of 64")
    parser.add_argument("--budgets", nargs="+", type=int, default=[6, 8, 12, 16])
    parser.add_argument("--rules", nargs="+", choices=[*RULES, *SIZED], default=[*RULES, *SIZED], metavar="RULE")
    options = parser.parse_args()
    use_compilation_cache(None)
    model = load(dtype="float32")
    report: dict[str, Any] = {
        "texts": options.texts, "tokens": options.tokens, "tree": dataclasses.asdict(TREE),
        "num_experts": model.config.num_experts, "num_experts_per_tok": model.config.num_experts_per_tok,
        "dtype": "float32", "device": jax.devices()[0].platform, "versions": versions(), "rows": [],
    }  # fmt: skip
    for kind, given in (("held-out", held_out(model, options)), ("own", own(model, options))):
        texts = Texts(model, TREE, given, [PIECE] * len(given))
        report["rows"].append({"text": kind, "rule": "exact", "budget": None, **measure(texts, None, None)})
        for rule in tqdm([r for r in options.rules if kind == "held-out" or r in OWN], desc=kind, unit="rule"):
            budgets = options.budgets if rule in RULES else [model.config.num_experts]
            for budget in budgets:
                config = BudgetConfig(model.config.num_experts, **(RULES | SIZED)[rule])
                report["rows"].append({"text": kind, "rule": rule, "budget": budget, **measure(texts, config, budget)})
                print(json.dumps(report["rows"][-1]), file=sys.stderr)
    report["equal_quality"] = equal_quality(report["rows"])
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "budget_quality.json").write_text(text)
    return 0


def equal_quality(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What budget gives every rule the divergence of MoE-Spec's own, by interpolation between the logarithms of the
    measured ones, with 95 % of a bootstrap over texts; no rule is credited with less than the smallest measured."""
    found: list[dict[str, Any]] = []
    for text in dict.fromkeys(row["text"] for row in rows):
        by_rule: dict[str, dict[int, np.ndarray]] = {}
        for row in rows:
            if row["text"] == text and row["rule"] in RULES:
                by_rule.setdefault(row["rule"], {})[row["budget"]] = np.array(row["kl_by_text"])
        for rule, own in by_rule.items():
            for budget, theirs in by_rule.get(PAPER, {}).items():
                draws = np.random.default_rng(0).integers(0, len(theirs), (2000, len(theirs)))
                matched = [_match(own, draw, theirs[draw].mean()) for draw in [np.arange(len(theirs)), *draws]]
                low, high = np.quantile(matched[1:], [0.025, 0.975], method="nearest").tolist()
                entry = {"text": text, "rule": rule, "paper_budget": budget, "budget": _known(matched[0])}
                found.append(entry | {"budget_95": [_known(low), _known(high)]})
    return found


def _known(budget: float) -> float | None:
    return round(budget, 2) if np.isfinite(budget) else None


def _match(own: dict[int, np.ndarray], draw: np.ndarray, target: float) -> float:
    """The budget at which a rule's mean over the drawn texts falls to `target`; infinite if it does not."""
    budgets = sorted(own)
    logs = [float(np.log(max(own[b][draw].mean(), 1e-9))) for b in budgets]
    for i, (budget, log) in enumerate(zip(budgets, logs, strict=True)):
        if log <= np.log(target):
            if i == 0:
                return float(budget)
            share = (logs[i - 1] - np.log(target)) / (logs[i - 1] - log)
            return budgets[i - 1] + float(share) * (budget - budgets[i - 1])
    return float("inf")


def held_out(model: Model, options: argparse.Namespace) -> list[list[int]]:
    """Evenly spaced pieces of the held-out modules."""
    return held_out_pieces(model, options.texts, PIECE + options.tokens + 1)


def own(model: Model, options: argparse.Namespace) -> list[list[int]]:
    """What the target itself would write, greedily."""
    return continued(model, held_out_pieces(model, options.texts), options.tokens + 1)


def measure(texts: Texts, rule: BudgetConfig | None, budget: int | None) -> dict[str, Any]:
    """Figures of one rule under one budget; without a rule, exactly."""
    found = summary(texts.teacher_force(rule, budget))
    names = ("kl", "kl_95", "top1", "top1_95", "accept_length", "experts_read", "kl_by_text")
    return {name: found[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
