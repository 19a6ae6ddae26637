"""Budgeted against exact speculation and plain decoding on this machine: `python -m benchmarks.budget_speed --out
benchmarks/results`.

The embedded pair on held-out prompts, batch 1, greedy, float32. For every tree: exactly, under a budget of all experts
(the same tokens; what the rule and its figures cost by themselves), of a half and a quarter of them, and with rows
pruned that keep less than a share of their combine weight ("faithfulness").
All settings take turns in one process: in every repeat each decodes all prompts, and its speed is divided by that of
exact speculation with the same tree, and by plain decoding's, of the same repeat. Agreement is the share of tokens up
to the first that plain decoding would have chosen otherwise, and so counts everything after it as lost.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.speculation import NEW, decode_all
from moespec_jax.cli.compare import agreement
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.measure.timing import spread
from moespec_jax.runtime.load import load

TREES = {"4/2/1": TreeConfig(2, 1, 4), "16/4/4": TreeConfig(4, 4, 16), "60/7/10": TreeConfig(7, 10, 60)}
PAPER: dict[str, Any] = dict(score="probability", credit="all")
LIKELY: dict[str, Any] = dict(anchor="likely", anchor_probability=0.0)
BUDGETS: dict[str, BudgetConfig | None] = {
    "exact": None,
    "all experts": BudgetConfig(1.0),
    "N/2, MoE-Spec": BudgetConfig(0.5, **PAPER),
    "N/2": BudgetConfig(0.5),
    "N/2, faithfulness 0.5": BudgetConfig(0.5, anchor="root", min_kept_weight=0.5),
    "N/2, faithfulness 1": BudgetConfig(0.5, **LIKELY, min_kept_weight=1.0),
    "N/4, MoE-Spec": BudgetConfig(0.25, **PAPER),
    "N/4": BudgetConfig(0.25),
    "N/4, faithfulness 0.3": BudgetConfig(0.25, anchor="root", min_kept_weight=0.3),
}


def main() -> int:
    """Time everything and write `budget_speed.json`, or print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory to write budget_speed.json to (default: print)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    options = parser.parse_args()
    model = load(dtype="float32")
    prompts = held_out_pieces(model, options.prompts)
    cases = {(tree, name): rule for tree in options.trees for name, rule in BUDGETS.items()}
    turns = []
    for _ in range(options.repeats + 1):
        turn = {case: decode_all(model, prompts, TREES[case[0]], rule) for case, rule in cases.items()}
        turns.append(turn | {"plain": decode_all(model, prompts, None)})
    report: dict[str, Any] = {"prompts": len(prompts), "new_tokens": NEW, "repeats": options.repeats, "rows": []}
    plain = turns[-1]["plain"]
    for tree, name in cases:
        # The first turn compiles and warms up.
        own = [turn[tree, name] for turn in turns[1:]]
        exact, alone = ([turn[key]["s_per_token"] for turn in turns[1:]] for key in ((tree, "exact"), "plain"))
        report["rows"].append(
            {
                "tree": tree,
                "budget": name,
                "tokens_per_s": spread([1 / one["s_per_token"] for one in own]),
                "over_exact": spread([a / one["s_per_token"] for a, one in zip(exact, own, strict=True)]),
                "over_plain": spread([a / one["s_per_token"] for a, one in zip(alone, own, strict=True)]),
                "accept_length": own[-1]["accept_length"],
                "experts_read": own[-1]["experts_read"],
                "agreement": round(agreement(plain["tokens"], own[-1]["tokens"]), 4),
            }
        )
        print(json.dumps(report["rows"][-1]), file=sys.stderr)
    report |= plain["where"] | {"plain_tokens_per_s": spread([1 / turn["plain"]["s_per_token"] for turn in turns[1:]])}
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "budget_speed.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
