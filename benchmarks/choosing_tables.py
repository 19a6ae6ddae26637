"""Tables of docs/choosing.md: speed of speculation and budgets on a CPU, and quality of the search.

Each function returns head and rows.
"""

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]


def choosing_cpu(report: dict[str, Any]) -> Table:
    """List the speed of exact trees and of budgets over plain decoding, one row a tree and budget."""
    shown = {"exact": "exact", "N/2": "LOSSY, half of the experts", "N/4": "LOSSY, a quarter of them"}
    rows = [
        [row["tree"], shown[row["budget"]], _times(row["over_plain"])]
        + [f"{row['accept_length']:.2f}", f"{row['experts_read']:.1f}"]
        for row in report["rows"]
        if row["budget"] in shown
    ]
    return ["size/depth/top-k", "output", "over plain", "tokens a round", "experts read"], rows


def tune_check(report: dict[str, Any]) -> Table:
    """Compare the choice of the search with the fastest of all timed settings, one row a bound."""
    rows = []
    for name, bound in {"exact": "exact", "lossy": f"divergence up to {report['max_kl']:g} nats (LOSSY)"}.items():
        found = report[name]
        errors = f"{found['median_prediction_error']:.0%}, at most {found['largest_prediction_error']:.0%}"
        rows.append(
            [bound, str(found["settings"]), found["choice"], found["best"], _times(found["choice_over_best"])]
            + [_times(found["choice_over_plain"]), errors]
        )
    head = ["bound", "settings timed", "chosen", "the best", "chosen over best", "chosen over plain"]
    return [*head, "error of predictions"], rows


def _times(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}x** ({ratio['min']:.2f} to {ratio['max']:.2f})"


# Function and result files of each table.
TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "choosing_cpu": (choosing_cpu, ("budget_speed.json",)),
    "tune_check": (tune_check, ("tune_check.json",)),
}
