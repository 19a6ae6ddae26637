"""Is what tuning chooses the best there is? `python -m benchmarks.tune_check --out benchmarks/results`

Of the embedded pair: the search of `python -m moespec_jax.tune` runs on a grid, exactly and within a divergence; then
every setting of the grid that the bound allows is timed in turns, the choice among them. `choice_over_best` compares
speeds of the same turns: 1 says that the search found the fastest. Predicted against measured speed of the search's ten
finalists stands beside it.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from moespec_jax.cli.command import use_compilation_cache
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import continued, held_out_pieces
from moespec_jax.measure.timing import Setting, speed, spread, take_turns, tree_name
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions
from moespec_jax.tune.candidates import LOSSY_RULES, grid
from moespec_jax.tune.report import rows
from moespec_jax.tune.search import PLAIN, Asked, Bound, Outcome, search

DEPTH, TOP_KS, SIZES = 5, (1, 2, 4), (4, 8, 16, 32)
LOSSY_TREES = [
    TreeConfig(2, 1, 4),
    TreeConfig(4, 1, 6),
    TreeConfig(3, 2, 8),
    TreeConfig(4, 4, 16),
    TreeConfig(5, 4, 32),
]
BUDGETS, MAX_KL = (8, 12, 16), 0.02


def main() -> int:
    """Search, measure everything, and write `tune_check.json`, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write tune_check.json to (default: print)")
    parser.add_argument("--ledger", type=Path, help="directory to go on from if cut off")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    use_compilation_cache(None)
    model = load(dtype="float32")
    prompts = held_out_pieces(model, options.prompts)
    report: dict[str, Any] = {
        "prompts": options.prompts, "new_tokens": options.tokens, "repeats": options.repeats, "max_kl": MAX_KL,
        "device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})", "dtype": "float32",
        "versions": versions(),
    }  # fmt: skip
    about = dict(report)
    with TemporaryDirectory() as temporary:
        for name, bound in {"exact": Bound(), "lossy": Bound(max_kl=MAX_KL)}.items():
            trees = grid(DEPTH, TOP_KS, SIZES) if bound.exact else LOSSY_TREES
            asked = Asked(bound, trees, BUDGETS, options.tokens, options.repeats)
            ledger = Ledger((options.ledger or Path(temporary)) / f"{name}.jsonl", {"check": name} | about)
            outcome = search(model, prompts, asked, ledger)
            report[name] = compare(model, prompts, asked, outcome, ledger)
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "tune_check.json").write_text(text)
    return 0


def compare(model: Model, prompts: list[list[int]], asked: Asked, outcome: Outcome, ledger: Ledger) -> dict[str, Any]:
    """The search's choice beside every setting that the bound allows."""
    settings = {PLAIN: Setting(), **{tree_name(tree): Setting(tree) for tree in asked.trees}}
    if not asked.bound.exact:
        settings |= allowed(model, prompts, asked, ledger)
    chosen = PLAIN if outcome.best is None else outcome.best.candidate.name
    setting = Setting() if outcome.best is None else outcome.best.candidate.setting
    turns = take_turns(model, prompts, settings | {chosen: setting}, asked.tokens, asked.repeats, ledger, label="all")
    medians = {name: statistics.median(speed(turn[name]) for turn in turns) for name in turns[0]}
    best = max(medians, key=lambda name: medians[name])
    finalists = rows(outcome)[:-1]
    errors = [abs(row["predicted_over_measured"] - 1) for row in finalists]
    return {
        "settings": len(settings),
        "choice": chosen,
        "best": best,
        "choice_over_best": spread([speed(turn[chosen]) / speed(turn[best]) for turn in turns]),
        "choice_over_plain": spread([speed(turn[chosen]) / speed(turn[PLAIN]) for turn in turns]),
        "best_over_plain": spread([speed(turn[best]) / speed(turn[PLAIN]) for turn in turns]),
        "median_prediction_error": round(statistics.median(errors), 4),
        "largest_prediction_error": round(max(errors), 4),
        "finalists": finalists,
        "tokens_per_s": {name: round(value, 1) for name, value in sorted(medians.items(), key=lambda item: -item[1])},
    }


def allowed(model: Model, prompts: list[list[int]], asked: Asked, ledger: Ledger) -> dict[str, Setting]:
    """All budgeted settings whose divergence, followed on its own tree, is within the bound."""
    texts = ledger.piece("all texts", lambda: continued(model, prompts, asked.tokens))
    found: dict[str, Setting] = {}
    for tree in asked.trees:
        following: list[Texts] = []
        for rule_name, rule in LOSSY_RULES.items():
            for budget in asked.budgets:
                key = f"all, loss of {tree_name(tree)}, {rule_name}, {budget}"
                if key not in ledger:
                    following = following or [Texts(model, tree, texts, [len(prompt) for prompt in prompts])]
                    every = BudgetConfig(model.config.num_experts, **rule)
                    ledger.put(key, summary(following[0].follow(every, budget))["kl"])
                if ledger.get(key) <= asked.bound.max_kl:
                    name = f"{tree_name(tree)} B={budget} {rule_name}"
                    found[name] = Setting(tree, BudgetConfig(budget, **rule))
    return found


if __name__ == "__main__":
    sys.exit(main())
