"""Chart of the rows: divergence, equal first choices and lost nats of texts, accuracy of answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moespec_jax.evaluate.report import groups, heading, output_word
from moespec_jax.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, which colour-blind people can distinguish.
EXACT, LOSSY = "#0072B2", "#D55E00"
_PANELS = {
    "texts": [
        ("kl", "divergence in nats", 1.0),
        ("top1", "same first choice, %", 100.0),
        ("nats_lost", "nats lost per token of the text", 1.0),
    ],
    "answers": [("accuracy", "correct answers, %", 100.0)],
}


def write_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with a row of panels for each set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = groups(rows)
    heights = [0.7 + 0.26 * len(part) for part in parts]
    figure, panels = pyplot.subplots(
        len(parts), 3, figsize=(10.5, sum(heights) + 0.9), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for line, part in zip(panels, parts, strict=True):
        used = _PANELS[part[0]["measured"]]
        for axes, panel in zip(line, [*used, *[None] * (3 - len(used))], strict=True):
            axes.axis("off") if panel is None else draw(axes, part, *panel)
        line[0].set_yticks(range(len(part)), [f"{row['way']} ({output_word(row)})" for row in part], fontsize=8)
        content = part[0]["kind"] if part[0]["measured"] == "texts" else f"{part[0]['questions']} questions"
        line[0].set_title(f"{part[0]['set']}, {content}", fontsize=9, loc="left")
    figure.suptitle(f"{heading(rows[0])}; lines: 95 % intervals", fontsize=9)
    with replacing(path) as temporary:
        # Without metadata, equal results give equal files.
        figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    pyplot.close(figure)


def draw(axes: "Axes", rows: Sequence[dict[str, Any]], name: str, label: str, scale: float) -> None:
    """Draw a point with its interval for each row, hollow where the output is lossy."""
    for place, row in enumerate(rows):
        colour = EXACT if row["exact"] else LOSSY
        low, high = (value * scale for value in row[f"{name}_95"])
        axes.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        face = colour if row["exact"] else "white"
        axes.plot(row[name] * scale, place, "o", color=colour, markerfacecolor=face, markersize=6)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    if any(row.get("rounds", 0) is None for row in rows):  # of small numbers, whose labels are long
        axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
