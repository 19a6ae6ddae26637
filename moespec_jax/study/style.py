"""Style of a study's figures: a palette for colour-blind readers, and names of lines beside their ends."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Palette of Okabe and Ito.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
GREY, PALE = "0.45", "0.8"
SETS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)


class Look(NamedTuple):
    """Label, colour and marker of a rule's line."""

    label: str
    colour: str
    marker: str


# Rules with a label and a colour of their own; all others are pale and unnamed.
LOOKS = {
    "MoE-Spec (probability, all)": Look("MoE-Spec", RED, "o"),
    "depth, hits, anchor root (AcceptMoE)": Look("AcceptMoE", ORANGE, "s"),
    "path, hits, guarantee 0.5 (OEA)": Look("OEA", PURPLE, "D"),
    "path, squares (default)": Look("default", BLUE, "o"),
    "path, squares, faithfulness 0.5": Look("faithfulness 0.5", GREEN, "^"),
    "path, squares, guarantee 0, faithfulness 1 (exact)": Look("faithfulness 1", "black", "x"),
}
OTHER = Look("other rules", PALE, "")


def look(rule: str) -> Look:
    """Find the look of a rule."""
    return LOOKS.get(rule, OTHER)


def marked(label: str, outputs: Iterable[str]) -> str:
    """Append `exact` to a label if the output of every row that it stands for is exact."""
    return f"{label}, exact" if set(outputs) == {"exact"} else label


def exactness_note(outputs: Iterable[str]) -> str:
    """Describe the outputs of all rows of a picture: `exact`, `lossy`, or which of them are lossy."""
    found = set(outputs)
    return found.pop() if len(found) == 1 else "lossy where not marked exact"


def line_style(rule: str) -> dict[str, Any]:
    """Return the arguments of `Axes.plot` for a rule: named ones in colour and in front, the others pale and behind."""
    found = look(rule)
    named = rule in LOOKS
    return dict(
        color=found.colour, marker=found.marker, markersize=4.5, linewidth=1.8 if named else 1.0,
        zorder=3 if named else 1.5,
    )  # fmt: skip


def open_axes(axes: "Axes") -> None:
    """Remove the upper and right spine, and add a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93", linewidth=0.7)
    axes.set_axisbelow(True)


class End(NamedTuple):
    """Right end of a line: its last value, and the name beside it with its colour."""

    value: float
    label: str
    colour: str


def label_ends(axes: "Axes", ends: Sequence[End], gap: float = 0.062, size: float = 8.5) -> None:
    """Write the names of lines at the right edge, each as near its line's last value as a distance of `gap` (a fraction
    of the axes' height) to the next allows, and within the axes if there is room. Call it once the limits are final."""
    low, high = axes.get_ylim()
    shown = [
        end for end in ends if np.isfinite(end.value) and end.value > (0 if axes.get_yscale() == "log" else -np.inf)
    ]
    scale = axes.transScale + axes.transLimits
    x = axes.get_xlim()[1]
    targets = np.array([scale.transform((x, float(np.clip(e.value, low, high))))[1] for e in shown])
    heights = _spread(targets, gap)
    heights += max(0.0, -heights.min(initial=0.0)) - max(0.0, heights.max(initial=1.0) - 1)
    for end, height, target in zip(shown, heights, targets, strict=True):
        axes.annotate(
            end.label, (1.0, target), (1.03, height), xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=size, color=end.colour, annotation_clip=False, parse_math=False,
            arrowprops=dict(
                arrowstyle="-", color=end.colour, linewidth=0.6, shrinkA=1, shrinkB=1, relpos=(0.0, 0.5)
            ),
        )  # fmt: skip


def _spread(targets: np.ndarray, gap: float) -> np.ndarray:
    """Move heights apart until neighbours differ by at least `gap`, in the order of `targets`: in every pass both of a
    pair that is too close move by half of what is missing."""
    heights = targets.copy()
    order = np.argsort(targets, kind="stable")
    for _ in range(200):
        moved = False
        for below, above in zip(order[:-1], order[1:], strict=True):
            missing = gap - (heights[above] - heights[below])
            if missing > 1e-6:
                heights[below] -= missing / 2
                heights[above] += missing / 2
                moved = True
        if not moved:
            break
    return heights
