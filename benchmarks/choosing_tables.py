"""Tables of docs/choosing.md: speed of speculation, budgets and chosen shapes on a CPU, and quality of the search.

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


def auto_cpu(report: dict[str, Any]) -> Table:
    """Compare chosen shapes with plain decoding and the best fixed setting, one row a set of prompts and budget."""
    rows = []
    for row in report["speed"]["rows"]:
        if not row["setting"].startswith("auto"):
            continue
        output = "LOSSY, a quarter of the experts" if " B=" in row["setting"] else "exact"
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["share_of_rounds"].items() if share >= 0.01)
        best = row["best_fixed"].partition(" B=")[0]
        rows.append(
            [row["prompts"], output, _times(row["over_plain"]), best, _times(row["over_best_fixed"])]
            + [f"{row['worst_text_over_plain']:.2f}x", shares]
        )
    return ["prompts", "output", "over plain", "best fixed", "over best fixed", "worst text over plain", "rounds"], rows


def menu_compile(menus: dict[str, Any], cpu: dict[str, Any]) -> Table:
    """Compare compilation and memory of the default tree alone and of the whole menu, one row a device."""
    alone, menu = (cpu["compile"][name]["compile_s"] for name in ("4/2/1", "auto"))
    rows = [["CPU", "the embedded pair, with prefill", f"{alone:.0f} s", f"{menu:.0f} s", "", ""]]
    for chip, report in menus.items():
        first, *shapes = report["rows"]
        code = sum(row["code_mb"] for row in shapes)
        rows.append(
            [chip, report["model"], f"{first['compile_s']:.0f} s", f"{sum(row['compile_s'] for row in shapes):.0f} s"]
            + [f"{first['temp_mb']:.0f} → {max(row['temp_mb'] for row in shapes):.0f} MB"]
            + [f"{first['code_mb']:.0f} → {code:.0f} MB" if code else ""]
        )
    return ["compiled for", "model", "4/2/1 alone", "whole menu", "temporaries", "code"], rows


def _times(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}x** ({ratio['min']:.2f} to {ratio['max']:.2f})"


# Function and result files of each table.
TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "choosing_cpu": (choosing_cpu, ("budget_speed.json",)),
    "auto_cpu": (auto_cpu, ("auto.json",)),
    "menu_compile": (menu_compile, ("menu_compile.json", "auto.json")),
    "tune_check": (tune_check, ("tune_check.json",)),
}
