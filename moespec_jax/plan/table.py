"""Sizing table in Markdown."""

from collections.abc import Sequence
from typing import Any

_HEAD = (
    "| model | experts | slice | mesh (data x expert x tensor) | fits | memory, GB a device | available, GB |"
    " weights, GB | caches, GB | exchanged, MB a round | collectives a round |"
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows; GB are 10^9 bytes of one device."""
    return "\n".join([_HEAD, "|" + " --- |" * _HEAD.count(" | ") + " --- |", *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    mesh = " x ".join(part.partition("=")[2] for part in row["mesh"].split(","))
    fits = "yes" if row["fits"] else "**no**"
    memory = f"{row['memory'] / 1e9:.1f}" if row["fits"] else f"over {(row['weights'] + row['cache']) / 1e9:.1f}"
    found = row.get("collectives", {})
    size = f"{sum(size for _, size in found.values()) / 1e6:.1f}" if row["fits"] else ""
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in found.items()) or ("none" if row["fits"] else "")
    return (
        f"| {row['model']} | {row['experts']} | {row['slice']} | {mesh} | {fits} | {memory} |"
        f" {row['available'] / 1e9:.1f} | {row['weights'] / 1e9:.1f} | {row['cache'] / 1e9:.2f} | {size} | {kinds} |"
    )
