"""Tables of docs/drafters.md: what drafters without a head gain, from `drafters.json`.

Each function returns head and rows.
"""

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]


def ngram_gains(report: dict[str, Any]) -> Table:
    """List tokens a round of n-grams, one row a set of texts and temperature, one column a tree."""
    trees = list(dict.fromkeys(row["tree"] for row in report["rows"]))
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in report["rows"]:
        temperature = "given text" if row["temperature"] is None else f"{row['temperature']:g}"
        texts = found.setdefault((row["texts"], str(row["count"]), temperature), {})
        texts[row["tree"]] = row["accept_length"]
    rows = [[*name, *(f"{gains[tree]:.2f}" for tree in trees)] for name, gains in found.items()]
    return ["texts", "number", "temperature", *trees], rows


def self_agreement(report: dict[str, Any]) -> Table:
    """List how often a target agrees with itself at K experts a token, one row a target, one column a K."""
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for row in report["agreement"]:
        rows.setdefault((row["target"], str(row["of"])), {})[row["experts"]] = row["agreement"]
    most = range(1, 1 + max(max(shares) for shares in rows.values()))
    cells = [[*name, *(f"{shares[k]:.2f}" if k in shares else "" for k in most)] for name, shares in rows.items()]
    return ["target", "experts a token", *(f"K = {k}" for k in most)], cells


def ngram_times(report: dict[str, Any]) -> Table:
    """List the microseconds of drafting with n-grams, one row a tree, one column a length of the buffer."""
    times = report["ngram_us"]
    lengths = list(next(iter(times.values())))
    rows = [[tree, *(f"{by_length[length]:.0f}" for length in lengths)] for tree, by_length in times.items()]
    return ["size/depth/top-k", *(f"{int(length):,} tokens" for length in lengths)], rows


# Function and result files of each table.
TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "ngram_gains": (ngram_gains, ("drafters.json",)),
    "self_agreement": (self_agreement, ("drafters.json",)),
    "ngram_times": (ngram_times, ("drafters.json",)),
}
