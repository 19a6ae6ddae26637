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
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import continued, held_out_pieces
from moespec_jax.measure.timing import TimingCase, spread, time_interleaved, tokens_per_second
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions
from moespec_jax.tune.candidates import LOSSY_RULES, grid
from moespec_jax.tune.report import rows
from moespec_jax.tune.search import PLAIN, Bound, Outcome, SearchConfig, find_fastest

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
            search = SearchConfig(bound, trees, BUDGETS, options.tokens, options.repeats)
            ledger = Ledger((options.ledger or Path(temporary)) / f"{name}.jsonl", {"check": name} | about)
            outcome = find_fastest(model, prompts, search, ledger)
            report[name] = compare(model, prompts, search, outcome, ledger)
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "tune_check.json").write_text(text)
    return 0


def compare(
    model: Model, prompts: list[list[int]], search: SearchConfig, outcome: Outcome, ledger: Ledger
) -> dict[str, Any]:
    """The search's choice beside every setting that the bound allows."""
    cases = {PLAIN: TimingCase(), **{tree.name: TimingCase(DecodingSpec(tree)) for tree in search.trees}}
    if not search.bound.exact:
        cases |= allowed(model, prompts, search, ledger)
    chosen = PLAIN if outcome.best is None else outcome.best.candidate.name
    timed = cases if outcome.best is None else cases | {chosen: TimingCase(outcome.best.candidate.spec)}
    turns = time_interleaved(model, prompts, timed, search.tokens, search.repeats, ledger, label="all")
    speeds = {name: [tokens_per_second(turn[name]) for turn in turns] for name in turns[0]}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max(medians, key=lambda name: medians[name])
    finalists = rows(outcome)[:-1]
    errors = [abs(row["predicted_over_measured"] - 1) for row in finalists]
    return {
        "settings": len(cases),
        "choice": chosen,
        "best": best,
        "choice_over_best": ratios(speeds[chosen], speeds[best]),
        "choice_over_plain": ratios(speeds[chosen], speeds[PLAIN]),
        "best_over_plain": ratios(speeds[best], speeds[PLAIN]),
        "median_prediction_error": round(statistics.median(errors), 4),
        "largest_prediction_error": round(max(errors), 4),
        "finalists": finalists,
        "tokens_per_s": {name: round(value, 1) for name, value in sorted(medians.items(), key=lambda item: -item[1])},
    }


def ratios(speeds: list[float], base: list[float]) -> dict[str, float]:
    """Median and range of the speed over that of `base` in the same turn."""
    return spread([one / other for one, other in zip(speeds, base, strict=True)])


def allowed(model: Model, prompts: list[list[int]], search: SearchConfig, ledger: Ledger) -> dict[str, TimingCase]:
    """All budgeted settings whose divergence, measured by teacher forcing on their own tree, is within the bound."""
    texts = ledger.task("all texts", lambda: continued(model, prompts, search.tokens))
    found: dict[str, TimingCase] = {}
    for tree in search.trees:
        forced: list[Texts] = []  # prefilled when it is needed
        for rule_name, rule in LOSSY_RULES.items():
            for budget in search.budgets:
                key = f"all, loss of {tree.name}, {rule_name}, {budget}"
                if key not in ledger:
                    forced = forced or [Texts(model, tree, texts, [len(prompt) for prompt in prompts])]
                    every = BudgetConfig(model.config.num_experts, **rule)
                    ledger.put(key, summary(forced[0].teacher_force(every, budget))["kl"])
                if ledger.get(key) <= search.bound.max_kl:
                    name = f"{tree.name} B={budget} {rule_name}"
                    found[name] = TimingCase(DecodingSpec(tree, BudgetConfig(budget, **rule)))
    return found


if __name__ == "__main__":
    sys.exit(main())
