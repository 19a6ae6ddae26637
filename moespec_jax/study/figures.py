"""Figures of a study, drawn from arrays onto given matplotlib axes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from moespec_jax.study.demand import least_budget, uniform_union
from moespec_jax.study.style import GREY, LOOKS, SETS, End, label_ends, line_style, look, marked, open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def draw_unions(
    axes: "Axes", curves: Mapping[str, Float[np.ndarray, " sizes"]], experts: int, active: int, label: bool = True
) -> None:
    """Draw the distinct experts by number of nodes verified together: a curve for each set, and uniform choice."""
    ends, nodes = [], np.arange(1, 1 + max(len(curve) for curve in curves.values()))
    uniform = uniform_union(experts, active, nodes)
    axes.plot(nodes, uniform, color=GREY, linestyle="--", linewidth=1.4)
    axes.axhline(experts, color=GREY, linestyle=":", linewidth=1)
    for colour, (name, curve) in zip(_cycle(len(curves)), curves.items(), strict=True):
        axes.plot(np.arange(1, 1 + len(curve)), curve, color=colour, linewidth=2)
        ends.append(End(curve[-1], name, colour))
    axes.set(xlabel="nodes verified together, best score first", ylabel="distinct experts a layer, mean of layers")
    axes.set(xlim=(1, len(nodes)), ylim=(0, experts * 1.04))
    open_axes(axes)
    ends += [End(uniform[-1], "uniform choice", GREY), End(experts, f"all {experts}", GREY)]
    if label:
        label_ends(axes, ends)


def draw_kept_mass(axes: "Axes", curves: Mapping[str, Float[np.ndarray, " experts"]], share: float = 0.9) -> None:
    """Draw the share of router probability by budget: a curve for each set, with the least budget that keeps
    `share`."""
    experts = max(len(curve) for curve in curves.values())
    axes.axhline(share, color=GREY, linestyle=":", linewidth=1)
    axes.plot([0, experts], [0, 1], color=GREY, linestyle="--", linewidth=1)
    for number, (colour, (name, curve)) in enumerate(zip(_cycle(len(curves)), curves.items(), strict=True)):
        least = int(least_budget(curve, share))
        axes.plot(np.arange(len(curve) + 1), [0, *curve], color=colour, linewidth=2)
        axes.plot(least, curve[least - 1], color=colour, marker="o", markersize=6, markeredgecolor="white", zorder=4)
        # The curves nearly coincide: their names are listed in the empty corner.
        axes.text(
            0.97, 0.06 + 0.075 * (len(curves) - 1 - number), f"{name}: B = {least}", color=colour, ha="right",
            transform=axes.transAxes, fontsize=9, parse_math=False,
        )  # fmt: skip
    axes.text(
        0.97, 0.06 + 0.075 * len(curves), f"least B that keeps {share:.0%}", color=GREY, ha="right",
        transform=axes.transAxes, fontsize=9,
    )  # fmt: skip
    axes.text(experts * 0.02, share + 0.015, f"{share:.0%}", color=GREY, fontsize=8.5)
    axes.set(xlabel=f"B heaviest of {experts} experts", ylabel="share of a tree's router probability")
    axes.set(xlim=(0, experts), ylim=(0, 1.02))
    open_axes(axes)


def draw_least_budget(axes: "Axes", by_layer: Mapping[str, Int[np.ndarray, " layers"]], experts: int) -> None:
    """Draw the least budget that keeps 90 % of the router probability, by layer."""
    for number, (colour, (_, least)) in enumerate(zip(_cycle(len(by_layer)), by_layer.items(), strict=True)):
        # Markers of equal budgets would overlap.
        shift = (number - (len(by_layer) - 1) / 2) * 0.09
        axes.plot(np.arange(len(least)) + shift, least, color=colour, marker="o", linewidth=1, markersize=5)
    _whole_numbers(axes)
    axes.set(xlabel="sparse layer", ylabel="least B that keeps 90 %", ylim=(0, experts * 1.02))
    open_axes(axes)


def draw_by_budget(
    axes: "Axes", lines: Mapping[str, Mapping[str, Sequence[Any]]], column: str, logarithmic: bool = False
) -> list[End]:
    """Draw a column by budget: a line for each rule, with its interval where the rule is named in `LOOKS` and there are
    columns `column_low` and `column_high`.

    `lines` maps rules to columns, `budget` among them; a rule is marked as exact where all of its `output` is. Returns
    the lines' ends, to be labelled once limits are final.
    """
    ends, floor = [], 0.0 if logarithmic else -np.inf
    for rule, columns in lines.items():
        values = np.array(columns[column], float)
        values = np.where(values > floor, values, np.nan)
        axes.plot(columns["budget"], values, **line_style(rule))
        if rule in LOOKS and f"{column}_low" in columns:
            low, high = (np.array(columns[f"{column}_{end}"], float) for end in ("low", "high"))
            inside = (low > floor) & np.isfinite(values)
            axes.fill_between(
                columns["budget"], low, high, where=inside.tolist(), color=look(rule).colour, alpha=0.09, linewidth=0
            )
        if rule in LOOKS and np.isfinite(values[-1]):
            ends.append(End(float(values[-1]), marked(look(rule).label, columns.get("output", ())), look(rule).colour))
    if logarithmic:
        axes.set_yscale("log")
    budgets = sorted({b for columns in lines.values() for b in columns["budget"]})
    axes.set_xticks(budgets, [str(b) for b in budgets])
    open_axes(axes)
    return ends


def draw_speed(axes: "Axes", rows: Sequence[Mapping[str, Any]], column: str, scale: float = 1.0) -> list[End]:
    """Draw a column of `rows.throughput_rows` of one set by budget: a line for each rule, and horizontal ones for plain
    decoding and for the tree without a budget. Returns their ends, as `draw_by_budget`."""
    rules = dict.fromkeys(row["rule"] for row in rows if row["budget"] is not None)
    lines = {}
    for rule in rules:
        own = [row for row in rows if row["rule"] == rule]
        lines[rule] = {name: [row[name] for row in own] for name in ("budget", "output")}
        lines[rule]["value"] = [row[column] * scale for row in own]
        for end in ("low", "high"):
            bound = column.replace("median", {"low": "min", "high": "max"}[end])
            lines[rule][f"value_{end}"] = [row[bound] * scale for row in own]
    ends = draw_by_budget(axes, lines, "value")
    for rule, label in {"plain": "plain", "exact": "no budget"}.items():
        row = next(row for row in rows if row["rule"] == rule)
        level = row[column] * scale
        axes.axhline(level, color="black", linestyle="--" if rule == "plain" else ":", linewidth=1)
        ends.append(End(level, marked(label, [row["output"]]), "black"))
    return ends


def draw_lift(axes: "Axes", lifted: Float[np.ndarray, "experts experts"], order: Sequence[int]) -> "AxesImage":
    """Draw the lift of every pair of experts as a heat map, experts in `order`. White is a lift of 1, the darkest
    violet 1/8 or less, the darkest orange 8 or more."""
    shown = lifted[np.ix_(order, order)]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.clip(np.log2(shown), -3, 3)
    axes.set_facecolor("0.75")
    image = axes.imshow(values, cmap="PuOr_r", vmin=-3, vmax=3, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set(xlabel=f"{len(order)} experts")
    return image


def draw_acceptance(axes: "Axes", curves: Mapping[tuple[str, str], Float[np.ndarray, "3 depths"]]) -> None:
    """Draw the share of rounds that commit a node of each depth, with its low and high bounds, by set and kind of text.
    Each set has its colour of the other figures; the second kind of text of a set is dashed."""
    sets, ends = list(dict.fromkeys(name for name, _ in curves)), []
    drawn: set[str] = set()
    for (name, kind), (share, low, high) in curves.items():
        colour, depth = SETS[sets.index(name) % len(SETS)], np.arange(1, 1 + len(share))
        dashes = "--" if name in drawn else "-"
        axes.plot(depth, share, color=colour, marker="o", markersize=4, linewidth=1.8, linestyle=dashes)
        axes.fill_between(depth, low, high, color=colour, alpha=0.13, linewidth=0)
        ends.append(End(float(share[-1]), f"{name}, {kind}\n{1 + share.sum():.2f} tokens a round", colour))
        drawn.add(name)
    _whole_numbers(axes)
    axes.set(xlabel="depth in the tree", ylabel="share of rounds that commit a node", ylim=(0, 1))
    open_axes(axes)
    label_ends(axes, ends, gap=0.12)


def draw_contrasts(axes: "Axes", rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Draw each rule's divergence relative to MoE-Spec's own, with its interval: a line of the figure for each rule in
    `order`. `rows` are those of `conclusion.finding_rows` for one subject and budget."""
    from matplotlib.ticker import LogLocator

    axes.axvline(1, color=look(rows[0]["against"]).colour, linewidth=1.2)
    least = min((1 / row["times_high"] for row in rows if row["times_high"]), default=0.1)
    for row in rows:
        y, colour = order.index(row["rule"]), look(row["rule"]).colour if row["rule"] in LOOKS else GREY
        if row["times"] is None:
            label = f"{row['output']}: {row['kl']:g} nats"  # no ratio to a divergence of 0
            axes.text(least, y, label, va="center", fontsize=8.5, color=colour)
            continue
        low, high = 1 / row["times_high"], 1 / row["times_low"]
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(1 / row["times"], y, color=colour, marker="o" if row["keeps_all_drafts"] else "^", markersize=6)
        if row["output"] == "exact":  # rounding may leave a divergence above 0
            axes.annotate(
                "exact", (1 / row["times"], y), (0, 5), textcoords="offset points", fontsize=8.5, color=colour
            )
    axes.set_yticks(range(len(order)), order, parse_math=False)
    axes.set(xscale="log", ylim=(len(order) - 0.4, -0.6), xlabel="divergence relative to MoE-Spec's own rule")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", labelsize=8)
    open_axes(axes)


def _cycle(count: int) -> list[str]:
    return [SETS[number % len(SETS)] for number in range(count)]


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
