"""Chart of the rows: speed of each setting, with its range."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moespec_jax.bench.table import groups, output_word
from moespec_jax.files import replacing
from moespec_jax.runtime.results import devices_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, which colour-blind people can distinguish.
EXACT, BUDGETS = "#0072B2", ("#E69F00", "#D55E00", "#CC79A7", "#009E73")


def write_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with a panel for each set of prompts and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = groups(rows)
    heights = [0.9 + 0.3 * len(part) for part in parts]
    figure, panels = pyplot.subplots(
        len(parts), 1, figsize=(8.5, sum(heights) + 1.0), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axes, part in zip(panels[:, 0], parts, strict=True):
        draw_speeds(axes, part)
    first = rows[0]
    marked = "SIMULATED acceptance and routing skew, random weights\n" if first["simulated"] else ""
    figure.suptitle(
        f"{marked}{first['model']}, {devices_text(first['device'], first['mesh'])}, {first['dtype']};"
        f" median and range of {first['repeats']} turns", fontsize=10,
    )  # fmt: skip
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)


def draw_speeds(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    """Draw a bar for each row, hatched where it is lossy, with lines at plain decoding and the best exact setting."""
    budgets = list(dict.fromkeys(row["expert_budget"] for row in rows if row["expert_budget"] is not None))
    colours = {budget: BUDGETS[i % len(BUDGETS)] for i, budget in enumerate(budgets)} | {None: EXACT}
    for place, row in enumerate(rows):
        speed = row["output_throughput"]
        median, low, high = speed["median"], speed["min"], speed["max"]
        hatch = None if row["expert_budget"] is None or row["exact"] else "///"
        axes.barh(place, median, color=colours[row["expert_budget"]], hatch=hatch, edgecolor="white", height=0.75)
        axes.plot([low, high], [place, place], color="0.15", linewidth=1.4, solid_capstyle="butt")
        axes.annotate(
            f"{median:.0f}" if median >= 100 else f"{median:.3g}", (high, place), (4, 0), va="center", fontsize=8,
            textcoords="offset points",
        )  # fmt: skip
    legend = draw_baselines(axes, {row["setting"]: row["output_throughput"]["median"] for row in rows}, rows[0])
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    batch = f", {rows[0]['batch_size']} at a time" if rows[0]["batch_size"] > 1 else ""
    axes.set_title(f"{rows[0]['prompts']}, {rows[0]['count']} prompts{batch}", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"tokens per second ({legend})", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_baselines(axes: "Axes", speeds: Mapping[str, float], row: dict[str, Any]) -> str:
    """Draw lines at plain decoding and at the best exact setting if it is another one; returns their legend."""
    plain, best = row["setting"], row["best_exact"]
    axes.axvline(speeds[plain], color="0.3", linewidth=1, linestyle=":", zorder=0)
    if best == plain:
        return "dotted: plain decoding, the best exact setting"
    axes.axvline(speeds[best], color="0.3", linewidth=1, linestyle="--", zorder=0)
    return f"dotted: plain decoding; dashed: the best exact setting, {best}"


def label(row: dict[str, Any]) -> str:
    """Label of a row: `60/7/10, B = 0.5 (LOSSY)`."""
    budget = "" if row["expert_budget"] is None else f", B = {row['expert_budget']}"
    return f"{row['tree']}{budget} ({output_word(row)})"
