"""Sizing tables in Markdown."""

from collections.abc import Sequence
from typing import Any

_HEAD = (
    "| model | experts | slice | mesh (data x expert x tensor) | fits | memory, GB a device | available, GB |"
    " weights, GB | caches, GB | exchanged, MB a round | collectives a round |"
)


_CARDS_HEAD = (
    "| model | experts | cards | mesh (data x expert x tensor) | fits | memory, GB a card | available, GB |"
    " weights, GB | head, GB | caches, GB | temporaries, GB | floor of a token, ms | floor of a round, ms |"
)
LEGEND = """
GB are 10^9 bytes of one card. "with .95": beyond the three quarters that JAX reserves by default; set
XLA_CLIENT_MEM_FRACTION=.95. Floors are bytes of weights over the published bandwidth of the cards' memory, not
measurements; that of a round is from the fewest experts that its tokens can select to the most. int8 and mxfp4 are
--quantization of these names; mxfp4 rounds experts coarsely unless they are published so, as those of gpt-oss. Other
quantized checkpoints are dequantized when they are loaded, and need as much as in bfloat16. Several cards are not
tried yet: --mesh as in the table.
"""


def cards_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of cards; GB are 10^9 bytes of one card."""
    return "\n".join([_CARDS_HEAD, "|" + " --- |" * (_CARDS_HEAD.count("|") - 1), *map(_cards_line, rows)])


def _cards_line(row: dict[str, Any]) -> str:
    temporaries = "" if row["temporaries"] is None else f"{row['temporaries'] / 1e9:.2f}"
    floors = [""] * 2
    if row["fits"]:
        floors = [f"{row['token_floor_ms']:.2f}", " to ".join(f"{ms:.2f}" for ms in row["round_floor_ms"])]
    gigabytes = [f"{row[name] / 1e9:.1f}" for name in ("memory", "available", "weights")]
    smaller = [f"{row[name] / 1e9:.2f}" for name in ("head", "cache")]
    cells = [row["model"], row["experts"], row["cards"], mesh_sizes(row), fits_word(row), *gigabytes, *smaller]
    return "| " + " | ".join([*cells, temporaries, *floors]) + " |"


def fits_word(row: dict[str, Any]) -> str:
    """Say whether a model fits cards, and with which share of their memory."""
    return {None: "**no**", 0.75: "yes", 0.95: "with .95"}[row["memory_fraction"]]


def mesh_sizes(row: dict[str, Any]) -> str:
    """Format the sizes of a mesh."""
    return " x ".join(part.partition("=")[2] for part in row["mesh"].split(","))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows; GB are 10^9 bytes of one device."""
    return "\n".join([_HEAD, "|" + " --- |" * _HEAD.count(" | ") + " --- |", *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    fits = "yes" if row["fits"] else "**no**"
    memory = f"{row['memory'] / 1e9:.1f}" if row["fits"] else f"over {(row['weights'] + row['cache']) / 1e9:.1f}"
    found = row.get("collectives", {})
    size = f"{sum(size for _, size in found.values()) / 1e6:.1f}" if row["fits"] else ""
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in found.items()) or ("none" if row["fits"] else "")
    return (
        f"| {row['model']} | {row['experts']} | {row['slice']} | {mesh_sizes(row)} | {fits} | {memory} |"
        f" {row['available'] / 1e9:.1f} | {row['weights'] / 1e9:.1f} | {row['cache'] / 1e9:.2f} | {size} | {kinds} |"
    )
