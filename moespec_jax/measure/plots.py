"""Pictures of a round and of what a budget does to a text, drawn onto given matplotlib axes.

Nodes are those of `tree.Tree`: the root is node 0 and a parent precedes its children.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCEPTED, DRAFTED = "tab:blue", "0.75"
# Red, green and blue of a cell of the mask: hidden, seen, seen by an accepted node.
_CELLS = np.array([[1.0, 1.0, 1.0], [0.78, 0.78, 0.78], [0.12, 0.47, 0.71]])
_BOX = dict(boxstyle="round,pad=0.3", linewidth=1.2)


def token_labels(decode: Callable[[list[int]], str | None], tokens: Sequence[int], longest: int = 12) -> list[str]:
    """Each token's text with its white space made visible, or its id where there is no tokenizer."""
    texts = [decode([int(token)]) for token in tokens]
    return [str(t) if text is None else _shown(text, longest) for t, text in zip(tokens, texts, strict=True)]


def node_positions(parents: Sequence[int]) -> np.ndarray:
    """Where nodes are drawn, `[nodes, 2]`: across, their depth; down, leaves one below the other, best child first, and
    every other node in the middle of its children."""
    place = np.zeros((len(parents), 2))
    leaves = iter(range(len(parents)))

    def put(node: int, depth: int) -> float:
        rows = [put(child, depth + 1) for child in range(len(parents)) if parents[child] == node]
        place[node] = depth, (rows[0] + rows[-1]) / 2 if rows else next(leaves)
        return place[node, 1]

    put(0, 0)
    return place


def draw_tree(
    axes: "Axes",
    parents: Sequence[int],
    labels: Sequence[str],
    chances: Sequence[float],
    accepted: Sequence[int],
    bonus: str | None = None,
) -> None:
    """A draft tree from left to right: each node with its number, text and the draft's chance of the path to it.

    `accepted` are the accepted nodes after the root, which are coloured; `bonus` is the text of the token that the
    target gives after the last of them.
    """
    place, path = node_positions(parents), {0, *accepted}
    for node, parent in enumerate(parents):
        if parent >= 0:
            taken = node in path
            colour, width = (ACCEPTED, 2.4) if taken else (DRAFTED, 1.0)
            axes.plot(*place[[parent, node]].T, color=colour, linewidth=width, zorder=1 + taken)
        _box(axes, place[node], f"{node}  {labels[node]}\n{_percent(chances[node])}", node in path)
    if bonus is not None:
        last = [0, *accepted][-1]
        (x, y), below = place[last], place[:, 1].max() + 1
        end = (x + 1, below if last in parents else y)
        axes.plot(*zip((x, y), end, strict=True), color=ACCEPTED, linewidth=1.2, linestyle=":", zorder=1)
        _box(axes, end, f"{bonus}\nbonus", True, linestyle=":")
    axes.set(ylim=(place[:, 1].max() + 1.6, -0.8), xlim=(-0.5, place[:, 0].max() + 1.2))
    axes.axis("off")


def draw_mask(axes: "Axes", parents: Sequence[int], labels: Sequence[str], accepted: Sequence[int]) -> None:
    """Which nodes a node sees: a row for each node, a column for the text before the tree and one for each node."""
    count, path = len(parents), {0, *accepted}
    seen = np.eye(count, dtype=int)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    cells = np.concatenate([np.ones((count, 1), int), seen], axis=1)
    cells[sorted(path)] *= 2
    axes.imshow(_CELLS[cells], aspect="equal")
    axes.set_xticks(range(count + 1), ["text before", *_numbered(labels)], rotation=90, parse_math=False)
    axes.set_yticks(range(count), _numbered(labels), parse_math=False)
    axes.set_xticks(np.arange(count + 2) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.92", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.tick_params(labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def draw_union(axes: "Axes", chosen: Bool[np.ndarray, "layers nodes experts"]) -> None:
    """How many distinct experts the first nodes choose together, in each layer and on average."""
    union = np.logical_or.accumulate(chosen, axis=1).sum(axis=2)
    nodes = np.arange(1, union.shape[1] + 1)
    for layer, counts in enumerate(union):
        axes.plot(nodes, counts, color="tab:blue", alpha=0.35, linewidth=1, label=None if layer else "each layer")
    axes.plot(nodes, union.mean(axis=0), color="tab:blue", linewidth=2.2, label="mean of layers")
    axes.axhline(chosen.shape[2], color="0.6", linestyle=":", label=f"all {chosen.shape[2]} experts")
    axes.set(xlabel="nodes verified together, likeliest first", ylabel="experts a layer must read", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def draw_experts(axes: "Axes", chosen: Bool[np.ndarray, "layers nodes experts"]) -> None:
    """How many nodes choose each expert: a row for each layer, its most wanted expert first."""
    counts = -np.sort(-chosen.sum(axis=1), axis=1)
    image = axes.imshow(np.where(counts > 0, counts, np.nan), aspect="auto", cmap="viridis")
    for layer, row in enumerate(counts):
        for rank, count in enumerate(row):
            if count:
                colour = "white" if count < 0.6 * counts.max() else "black"
                axes.text(rank, layer, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(counts)))
    axes.set(xlabel="experts, by how many nodes choose them", ylabel="sparse layer")
    axes.figure.colorbar(image, ax=axes, label=f"of {chosen.shape[1]} nodes")


def draw_text(axes: "Axes", tokens: Sequence[str], marked: Sequence[bool], columns: int = 60, lines: int = 0) -> None:
    """A text of tokens in a typewriter's grid, marked ones on red ground: characters are 1 wide, lines 2 high, and as
    many `lines` are shown, or more if the text has them."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.textpath import TextPath

    # Outlines, and not text of a font size: a character's advance, 0.602 of the size, is then 1 at any scale.
    font, last = FontProperties(family="monospace"), 0
    for last, column, piece, mark in _typed(tokens, marked, columns):
        if mark:
            axes.add_patch(Rectangle((column, -2 * last - 0.7), len(piece), 2, facecolor="#f4b6ae", linewidth=0))
        if piece.strip():
            outline = TextPath((column, -2 * last), piece.replace("$", r"\$"), size=1 / 0.602, prop=font)
            axes.add_patch(PathPatch(outline, facecolor="black", linewidth=0.1, snap=False))
    axes.set(xlim=(0, columns), ylim=(-2 * max(last + 1, lines) + 1, 2), aspect="equal", anchor="NW")
    axes.axis("off")


def differing(one: Sequence[int], other: Sequence[int]) -> list[bool]:
    """Which tokens of a text have no partner in the other, when as much as possible is paired in order."""
    import difflib

    marks = [True] * len(one)
    for start, _, size in difflib.SequenceMatcher(None, list(one), list(other), autojunk=False).get_matching_blocks():
        marks[start : start + size] = [False] * size
    return marks


def _typed(tokens: Sequence[str], marked: Sequence[bool], columns: int) -> Iterator[tuple[int, int, str, bool]]:
    """Line, column and text of every piece of a token that stands in one line."""
    line = column = 0
    for token, mark in zip(tokens, marked, strict=True):
        for number, part in enumerate(token.replace("\t", "    ").split("\n")):
            line, column = (line + 1, 0) if number else (line, column)
            for start in range(0, len(part), columns):
                piece = part[start : start + columns]
                line, column = (line + 1, 0) if column + len(piece) > columns else (line, column)
                yield line, column, piece, bool(mark)
                column += len(piece)


def _shown(text: str, longest: int) -> str:
    text = text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _percent(chance: float) -> str:
    return f"{chance:.0%}" if chance >= 0.095 else f"{chance:.1%}"


def _numbered(labels: Sequence[str]) -> list[str]:
    return [f"{node}  {label}" for node, label in enumerate(labels)]


def _box(axes: "Axes", where: Sequence[float] | np.ndarray, text: str, taken: bool, linestyle: str = "-") -> None:
    box = _BOX | dict(
        facecolor="#dcebf7" if taken else "white", edgecolor=ACCEPTED if taken else DRAFTED, linestyle=linestyle
    )
    axes.text(
        where[0], where[1], text, ha="center", va="center", fontsize=9, zorder=4, bbox=box, parse_math=False,
        color="black" if taken else "0.35",
    )  # fmt: skip
