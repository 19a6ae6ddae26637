"""Rows as CSV files, and as tables of formatted cells."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moespec_jax.files import write_text


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], stamp: Mapping[str, Any]) -> None:
    """Write the rows under a line of column names, each with the columns of `stamp`. An interrupted write leaves no
    incomplete file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0], *stamp], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **stamp} for row in rows)
    write_text(file, text.getvalue())


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns of plain text; the first row holds the names of the columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def frontier_table(rows: Sequence[Mapping[str, Any]], budgets: Sequence[int]) -> list[list[str]]:
    """Format one kind of text's rows at some budgets: exact or lossy, divergence with its interval, share of positions
    with the same most probable token, and tokens a round."""
    table = [["rule", "B", "output", "divergence, nats (95 %)", "same first choice", "tokens a round"]]
    for row in rows:
        if row["budget"] is None or row["budget"] in budgets:
            span = f"{row['kl']:.4f} ({row['kl_low']:.4f} to {row['kl_high']:.4f})"
            size = "" if row["budget"] is None else str(row["budget"])
            table.append([row["rule"], size, row["output"], span, f"{row['top1']:.1%}", f"{row['accept_length']:.2f}"])
    return table


def speed_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Format the timed cases of one set."""
    table = [["rule", "B", "output", "over plain (range)", "tokens/s", "agreement", "tokens a round"]]
    for row in rows:
        ratio = f"{row['over_plain_median']:.2f}x ({row['over_plain_min']:.2f} to {row['over_plain_max']:.2f})"
        size = "" if row["budget"] is None else str(row["budget"])
        table.append(
            [row["rule"], size, row["output"], ratio, f"{row['tokens_per_s_median']:.0f}"]
            + [f"{row['agreement']:.1%}", f"{row['accept_length']:.2f}"]
        )  # fmt: skip
    return table


def mass_table(rows: Sequence[Mapping[str, Any]], column: str, experts: int) -> list[list[str]]:
    """Format by set: the least budget that keeps 90 % of the mass, and what half and a quarter of the experts keep."""
    half, quarter = experts // 2, experts // 4
    table = [["set", "least B for 90 %", f"kept by B = {half}", f"kept by B = {quarter}", "trees"]]
    means = [row for row in rows if row["layer"] == "mean"]
    for name in dict.fromkeys(row["set"] for row in means):
        by_budget = {row["budget"]: row for row in means if row["set"] == name}
        kept = [f"{by_budget[b]['mass']:.1%}" if b in by_budget else "" for b in (half, quarter)]
        table.append([name, str(by_budget[1][column]), *kept, str(by_budget[1]["trees"])])
    return table
