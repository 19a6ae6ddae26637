"""Tables that are wider than a terminal: columns of Markdown in several tables below each other, and long lines."""

import textwrap
from collections.abc import Sequence
from itertools import groupby

_WIDEST_CELL = 28


def fitted(text: str, width: int) -> str:
    """Rearrange the tables of a text that have lines of more than `width` characters. Each part repeats the first
    column, long cells are wrapped, and a cell may have several lines."""
    parts = []
    for table, lines in groupby(text.split("\n"), key=lambda line: line.startswith("|") and line.endswith("|")):
        found = list(lines)
        cells = {line.count(" | ") for line in found}
        parts += _fit(found, width) if table and len(cells) == 1 and max(map(len, found)) > width else found
    return "\n".join(parts)


def folded(text: str, width: int, indent: int) -> str:
    """Wrap lines at `width` characters; the rest of a line is indented."""
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if len(line) <= width else "\n".join(wrap.wrap(line)) for line in text.split("\n"))


def _fit(lines: Sequence[str], width: int) -> list[str]:
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    rows = [row for row in rows if not all(set(cell) <= set("-") for cell in row)]
    longest = max(1, min(_WIDEST_CELL, width // 2 - 4))
    columns = [[textwrap.wrap(cell, longest) or [""] for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    parts: list[list[int]] = []
    for number in range(1, len(columns)):
        if not parts or _total(widths, [*parts[-1], number]) > width:
            parts.append([0])
        parts[-1].append(number)
    tables = [_table([columns[i] for i in part], [widths[i] for i in part]) for part in parts or [[0]]]
    return "\n\n".join(tables).split("\n")


def _total(widths: Sequence[int], part: Sequence[int]) -> int:
    return sum(widths[i] + 3 for i in part) + 1


def _table(columns: Sequence[Sequence[Sequence[str]]], widths: Sequence[int]) -> str:
    lines = []
    for number, cells in enumerate(zip(*columns, strict=True)):
        for i in range(max(map(len, cells))):
            shown = [(cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(cells, widths, strict=True)]
            lines.append(f"| {' | '.join(shown)} |")
        if number == 0:
            lines.append(f"| {' | '.join('-' * w for w in widths)} |")
    return "\n".join(lines)
