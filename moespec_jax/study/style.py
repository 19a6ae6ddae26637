"""How a study's figures look: colours that colour-blind people tell apart, names of lines beside their ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
GREY, PALE = "0.45", "0.8"
SETS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)


class Look(NamedTuple):
    """Of one rule's line."""

    label: str
    colour: str
    marker: str


# Rules that are named in figures; all others are pale.
LOOKS = {
    "MoE-Spec (probability, all)": Look("MoE-Spec", RED, "o"),
    "depth, hits, anchor root (AcceptMoE)": Look("AcceptMoE", ORANGE, "s"),
    "path, hits, guarantee 0.5 (OEA)": Look("OEA", PURPLE, "D"),
    "path, squares (default)": Look("default", BLUE, "o"),
    "path, squares, faithfulness 0.5": Look("faithfulness 0.5", GREEN, "^"),
    "path, squares, guarantee 0, faithfulness 1 (exact)": Look("faithfulness 1, exact", "black", "x"),
}
OTHER = Look("other rules", PALE, "")


def look(rule: str) -> Look:
    """How a rule is drawn."""
    return LOOKS.get(rule, OTHER)


def line_style(rule: str) -> dict[str, Any]:
    """A named rule in colour and in front, the others pale and behind."""
    found = look(rule)
    named = rule in LOOKS
    return dict(
        color=found.colour, marker=found.marker, markersize=4.5, linewidth=1.8 if named else 1.0,
        zorder=3 if named else 1.5,
    )  # fmt: skip


def open_axes(axes: "Axes") -> None:
    """Only the axes that are read, and pale lines to read along."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93", linewidth=0.7)
    axes.set_axisbelow(True)


class End(NamedTuple):
    """The end of a line that gets its name beside it."""

    value: float
    label: str
    colour: str


def label_ends(axes: "Axes", ends: Sequence[End], gap: float = 0.062, size: float = 8.5) -> None:
    """Names of lines at the right edge, each as near its line's last value as leaves `gap` (a share of the axes) to the
    next, within the height of the axes if there is room. To be called when the limits are final."""
    low, high = axes.get_ylim()
    shown = [
        end for end in ends if np.isfinite(end.value) and end.value > (0 if axes.get_yscale() == "log" else -np.inf)
    ]
    scale = axes.transScale + axes.transLimits
    x = axes.get_xlim()[1]
    wanted = np.array([scale.transform((x, float(np.clip(e.value, low, high))))[1] for e in shown])
    places = _spread(wanted, gap)
    places += max(0.0, -places.min(initial=0.0)) - max(0.0, places.max(initial=1.0) - 1)
    for end, place, own in zip(shown, places, wanted, strict=True):
        axes.annotate(
            end.label, (1.0, own), (1.03, place), xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=size, color=end.colour, annotation_clip=False, parse_math=False,
            arrowprops=dict(
                arrowstyle="-", color=end.colour, linewidth=0.6, shrinkA=1, shrinkB=1, relpos=(0.0, 0.5)
            ),
        )  # fmt: skip


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places no closer than `gap`, in the order of what is wanted, moved as little as neighbours allow."""
    places = wanted.copy()
    order = np.argsort(wanted, kind="stable")
    for _ in range(200):
        moved = False
        for below, above in zip(order[:-1], order[1:], strict=True):
            lack = gap - (places[above] - places[below])
            if lack > 1e-6:
                places[below] -= lack / 2
                places[above] += lack / 2
                moved = True
        if not moved:
            break
    return places
