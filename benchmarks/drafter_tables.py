"""Tables of docs/drafters.md: gain and cost of drafters without a head, and statistics of compiled block drafting.

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


def self_costs(report: dict[str, Any]) -> Table:
    """List the time of a drafting pass over one with all of a token's experts, one row a random target, one column a
    K."""
    rows = [row for row in report["rows"] if row["experts"] < row["of"]]
    return _by_experts(rows, "target", lambda row: f"{row['over_all']:.2f}")


def self_bytes(report: dict[str, Any]) -> Table:
    """List the bytes of a pass with K experts over those with all, one row a published shape, one column a K."""
    return _by_experts(report["bytes"], "model", lambda row: f"{row['over_all']:.2f}")


def _by_experts(rows: list[dict[str, Any]], column: str, cell: Callable[[dict[str, Any]], str]) -> Table:
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        found.setdefault((row[column], str(row["of"])), {})[row["experts"]] = cell(row)
    counts = sorted({count for cells in found.values() for count in cells})
    lines = [[*name, *(cells.get(count, "") for count in counts)] for name, cells in found.items()]
    return [column, "experts a token", *(f"K = {count}" for count in counts)], lines


def block_programs(report: dict[str, Any]) -> Table:
    """List the compilers' statistics of rounds of block drafting, one row a chip and program."""
    found = []
    for chip in ("v5e", "sm_90"):
        for row in report.get(chip, {"rows": []})["rows"]:
            copies = ", ".join(f"{count} {name}" for name, count in row["large_copies"].items()) or "none"
            caches = {None: "", True: "yes", False: "no"}[row.get("cache_aliased")]
            launches = ""
            if "kernels_per_round" in row:
                launches = f"{row['kernels_per_layer']:g} a layer, {row['rest']:g}, {row['kernels_per_round']:,.0f}"
            found.append(
                [chip, row["program"], row["tree"], f"{row['head_parameters_m']:g} M", f"{row['layers']}"]
                + [f"{row['temp_mb']:.0f} MB", caches, copies, launches]
            )
    head = ["chip", "round", "size/depth/top-k", "head", "layers compiled", "temporaries", "caches in place"]
    return [*head, "large values", "kernels: a layer, the rest, a round of 48 layers"], found


# Function and result files of each table.
TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "ngram_gains": (ngram_gains, ("drafters.json",)),
    "self_agreement": (self_agreement, ("drafters.json",)),
    "ngram_times": (ngram_times, ("drafters.json",)),
    "self_costs": (self_costs, ("self_drafting.json",)),
    "self_bytes": (self_bytes, ("self_drafting.json",)),
    "block_programs": (block_programs, ("block_programs.json",)),
}
