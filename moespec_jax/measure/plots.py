"""Plots of a draft tree, its attention mask, the experts of its nodes, and differences between texts.

Functions draw onto matplotlib axes of the caller. Nodes are those of `tree.Tree`: the root is node 0, and a parent
precedes its children.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCEPTED, DRAFTED = "tab:blue", "0.75"
# RGB of a cell of the mask: masked, attended to, attended to by an accepted node.
_CELLS = np.array([[1.0, 1.0, 1.0], [0.78, 0.78, 0.78], [0.12, 0.47, 0.71]])
_BOX = dict(boxstyle="round,pad=0.3", linewidth=1.2)


def token_labels(decode: Callable[[list[int]], str | None], tokens: Sequence[int], longest: int = 12) -> list[str]:
    """Format each token as its text with visible white space, cut to `longest` characters, or as its id.

    `decode` returns None where there is no tokenizer.
    """
    texts = [decode([int(token)]) for token in tokens]
    return [str(t) if text is None else _shown(text, longest) for t, text in zip(tokens, texts, strict=True)]


def node_positions(parents: Sequence[int]) -> np.ndarray:
    """Compute the positions of nodes, `[nodes, 2]`: x is the depth, y increases downwards.

    Leaves are one below the other, the best child first; any other node is in the middle of its children.
    """
    positions = np.zeros((len(parents), 2))
    leaves = iter(range(len(parents)))

    def put(node: int, depth: int) -> float:
        rows = [put(child, depth + 1) for child in range(len(parents)) if parents[child] == node]
        positions[node] = depth, (rows[0] + rows[-1]) / 2 if rows else next(leaves)
        return positions[node, 1]

    put(0, 0)
    return positions


def draw_tree(
    axes: "Axes",
    parents: Sequence[int],
    labels: Sequence[str],
    path_probabilities: Sequence[float],
    accepted: Sequence[int],
    bonus: str | None = None,
) -> None:
    """Draw a draft tree from left to right: each node with its number, text and path probability.

    `accepted` are the accepted nodes after the root, which are coloured; `bonus` is the text of the bonus token.
    """
    positions, path = node_positions(parents), {0, *accepted}
    for node, parent in enumerate(parents):
        if parent >= 0:
            on_path = node in path
            colour, width = (ACCEPTED, 2.4) if on_path else (DRAFTED, 1.0)
            axes.plot(*positions[[parent, node]].T, color=colour, linewidth=width, zorder=1 + on_path)
        _box(axes, positions[node], f"{node}  {labels[node]}\n{_percent(path_probabilities[node])}", node in path)
    if bonus is not None:
        last = [0, *accepted][-1]
        (x, y), below = positions[last], positions[:, 1].max() + 1
        end = (x + 1, below if last in parents else y)
        axes.plot(*zip((x, y), end, strict=True), color=ACCEPTED, linewidth=1.2, linestyle=":", zorder=1)
        _box(axes, end, f"{bonus}\nbonus", True, linestyle=":")
    axes.set(ylim=(positions[:, 1].max() + 1.6, -0.8), xlim=(-0.5, positions[:, 0].max() + 1.2))
    axes.axis("off")


def draw_mask(axes: "Axes", parents: Sequence[int], labels: Sequence[str], accepted: Sequence[int]) -> None:
    """Draw the tree's attention mask: a row for each node, a column for the committed text and one for each node."""
    count, path = len(parents), {0, *accepted}
    mask = np.eye(count, dtype=int)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    cells = np.concatenate([np.ones((count, 1), int), mask], axis=1)
    cells[sorted(path)] *= 2
    axes.imshow(_CELLS[cells], aspect="equal")
    axes.set_xticks(range(count + 1), ["committed text", *_numbered(labels)], rotation=90, parse_math=False)
    axes.set_yticks(range(count), _numbered(labels), parse_math=False)
    axes.set_xticks(np.arange(count + 2) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.92", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.tick_params(labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def draw_union(axes: "Axes", selected: Bool[np.ndarray, "layers nodes experts"]) -> None:
    """Draw the number of distinct experts that the first n nodes select, by n, for each layer and on average."""
    union = np.logical_or.accumulate(selected, axis=1).sum(axis=2)
    nodes = np.arange(1, union.shape[1] + 1)
    for layer, counts in enumerate(union):
        axes.plot(nodes, counts, color="tab:blue", alpha=0.35, linewidth=1, label=None if layer else "each layer")
    axes.plot(nodes, union.mean(axis=0), color="tab:blue", linewidth=2.2, label="mean of layers")
    axes.axhline(selected.shape[2], color="0.6", linestyle=":", label=f"all {selected.shape[2]} experts")
    axes.set(xlabel="nodes verified together, likeliest first", ylabel="experts a layer must read", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def draw_experts(axes: "Axes", selected: Bool[np.ndarray, "layers nodes experts"]) -> None:
    """Draw the number of nodes that select each expert: a row for each layer, in descending order."""
    counts = -np.sort(-selected.sum(axis=1), axis=1)
    image = axes.imshow(np.where(counts > 0, counts, np.nan), aspect="auto", cmap="viridis")
    for layer, row in enumerate(counts):
        for rank, count in enumerate(row):
            if count:
                colour = "white" if count < 0.6 * counts.max() else "black"
                axes.text(rank, layer, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(counts)))
    axes.set(xlabel="experts, in order of the number of nodes that select them", ylabel="sparse layer")
    axes.figure.colorbar(image, ax=axes, label=f"of {selected.shape[1]} nodes")


def draw_text(axes: "Axes", tokens: Sequence[str], marked: Sequence[bool], columns: int = 60, lines: int = 0) -> None:
    """Draw a text in a grid of characters, 1 wide and 2 high, with marked tokens on a red ground.

    The axes have room for `lines` lines, or for those of the text if they are more.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.textpath import TextPath

    # Outlines instead of text: the advance of a character, 0.602 of the font size, is then 1 at any scale.
    font, last = FontProperties(family="monospace"), 0
    for last, column, part, mark in _lay_out(tokens, marked, columns):
        if mark:
            axes.add_patch(Rectangle((column, -2 * last - 0.7), len(part), 2, facecolor="#f4b6ae", linewidth=0))
        if part.strip():
            outline = TextPath((column, -2 * last), part.replace("$", r"\$"), size=1 / 0.602, prop=font)
            axes.add_patch(PathPatch(outline, facecolor="black", linewidth=0.1, snap=False))
    axes.set(xlim=(0, columns), ylim=(-2 * max(last + 1, lines) + 1, 2), aspect="equal", anchor="NW")
    axes.axis("off")


def differing(one: Sequence[int], other: Sequence[int]) -> list[bool]:
    """Mark the tokens of `one` that an alignment with `other` leaves unmatched (`difflib.SequenceMatcher`)."""
    import difflib

    marks = [True] * len(one)
    for start, _, size in difflib.SequenceMatcher(None, list(one), list(other), autojunk=False).get_matching_blocks():
        marks[start : start + size] = [False] * size
    return marks


def _lay_out(tokens: Sequence[str], marked: Sequence[bool], columns: int) -> Iterator[tuple[int, int, str, bool]]:
    """Wrap tokens: line, column, text and mark of every part of a token that is within one line."""
    line = column = 0
    for token, mark in zip(tokens, marked, strict=True):
        for number, token_line in enumerate(token.replace("\t", "    ").split("\n")):
            line, column = (line + 1, 0) if number else (line, column)
            for start in range(0, len(token_line), columns):
                part = token_line[start : start + columns]
                line, column = (line + 1, 0) if column + len(part) > columns else (line, column)
                yield line, column, part, bool(mark)
                column += len(part)


def _shown(text: str, longest: int) -> str:
    text = text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _percent(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.095 else f"{probability:.1%}"


def _numbered(labels: Sequence[str]) -> list[str]:
    return [f"{node}  {label}" for node, label in enumerate(labels)]


def _box(axes: "Axes", where: Sequence[float] | np.ndarray, text: str, on_path: bool, linestyle: str = "-") -> None:
    box = _BOX | dict(
        facecolor="#dcebf7" if on_path else "white", edgecolor=ACCEPTED if on_path else DRAFTED, linestyle=linestyle
    )
    axes.text(
        where[0], where[1], text, ha="center", va="center", fontsize=9, zorder=4, bbox=box, parse_math=False,
        color="black" if on_path else "0.35",
    )  # fmt: skip
