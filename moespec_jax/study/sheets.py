"""Pictures of a study: figures with titles, drawn from rows, and saved with their sample at the foot."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from moespec_jax.config import DecoderConfig
from moespec_jax.files import replacing
from moespec_jax.study.coactivation import lift, order
from moespec_jax.study.figures import (
    draw_acceptance,
    draw_by_budget,
    draw_contrasts,
    draw_kept_mass,
    draw_least_budget,
    draw_lift,
    draw_speed,
    draw_unions,
)
from moespec_jax.study.rows import HELD, Row
from moespec_jax.study.rules import keeps_all
from moespec_jax.study.style import End, label_ends, marked, open_axes


def save(figure: Figure, file: Path, stamp: str) -> None:
    """Write a figure as PNG with `stamp` at its foot. An interrupted write leaves no incomplete file."""
    figure.supxlabel(stamp, fontsize=7, color="0.45", x=0.01, ha="left", parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    with replacing(file) as temporary:
        # A palette of 256 colours is enough for lines and text, and takes a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(256).save(temporary, format="png", optimize=True)


def unions_sheet(config: DecoderConfig, rows: Sequence[Row]) -> Figure:
    """Draw the distinct experts by tree size."""
    figure, (axes,) = _sheet(1, (7.2, 4.2))
    curves = {name: _column(own, "experts") for name, own in _by(_where(rows, layer="mean"), "set").items()}
    axes.set_title("Distinct experts by tree size", loc="left", fontsize=11)
    draw_unions(axes, curves, config.num_experts, config.num_experts_per_tok)
    return figure


def mass_sheet(config: DecoderConfig, rows: Sequence[Row]) -> Figure:
    """Draw the kept mass by budget, and the least budget that keeps `HELD` of it by layer."""
    figure, (left, right) = _sheet(2, (9.6, 4.2), [1.5, 1])
    least = f"least_budget_for_{HELD:.0%}"
    means = _by(_where(rows, layer="mean"), "set")
    left.set_title("Router probability kept by budget", loc="left", fontsize=11)
    draw_kept_mass(left, {name: _column(own, "mass") for name, own in means.items()}, HELD)
    right.set_title("by layer", loc="left", fontsize=11)
    layers = [row for row in rows if row["layer"] != "mean" and row["budget"] == 1]
    draw_least_budget(right, {n: _column(own, least) for n, own in _by(layers, "set").items()}, config.num_experts)
    return figure


def frontier_sheet(rows: Sequence[Row], over: str) -> Figure:
    """Draw divergence and acceptance length by budget: means over the sets of the rows."""
    figure, (left, right) = _sheet(2, (10.4, 4.8))
    lines = {rule: _mean_columns(own) for rule, own in _by(rows, "rule").items() if rule != "no budget"}
    left.set_title(f"Divergence by budget, {over}", loc="left", fontsize=11)
    _labelled(left, draw_by_budget(left, lines, "kl", logarithmic=True), "KL(exact || budgeted), nats")
    right.set_title("Acceptance length by budget", loc="left", fontsize=11)
    ends = draw_by_budget(right, lines, "accept_length")
    free = _where(rows, rule="no budget")
    without = float(np.mean([row["accept_length"] for row in free]))
    right.axhline(without, color="black", linestyle=":", linewidth=1)
    right.set_ylim(1, None)
    label = marked("no budget", [row["output"] for row in free])
    _labelled(right, [*ends, End(without, label, "black")], "tokens gained a round")
    return figure


def texts_sheet(rows: Sequence[Row]) -> Figure:
    """Draw divergence by budget: a panel for every set and kind of text."""
    texts = {f"{name}, {kind}": own for name, by in _by(rows, "set").items() for kind, own in _by(by, "text").items()}
    wide = min(2, len(texts))
    tall = -(-len(texts) // wide)
    figure, panels = _sheet(len(texts), (5.2 * wide, 3.6 * tall), columns=wide, sharey=True)
    ends = []
    for axes, (name, own) in zip(panels, texts.items(), strict=True):
        lines = {rule: _columns(one) for rule, one in _by(own, "rule").items() if rule != "no budget"}
        axes.set_title(name, loc="left", fontsize=10, parse_math=False)
        ends.append(draw_by_budget(axes, lines, "kl", logarithmic=True))
    for axes, found in zip(panels, ends, strict=True):  # afterwards: panels share the limits of their y axes
        _labelled(axes, found, "KL, nats")
    return figure


def speed_sheet(rows: Sequence[Row]) -> Figure:
    """Draw speed, and agreement with plain decoding, by budget: two panels for every set."""
    sets = _by(rows, "set")
    figure, panels = _sheet(2 * len(sets), (10.4, 0.6 + 3.4 * len(sets)), columns=2)
    for number, (name, own) in enumerate(sets.items()):
        left, right = panels[2 * number : 2 * number + 2]
        left.set_title(f"Speed by budget, {name}", loc="left", fontsize=11, parse_math=False)
        ends = draw_speed(left, own, "over_plain_median")
        left.set_ylim(0, None)
        _labelled(left, ends, "times plain decoding")
        right.set_title("Agreement with plain decoding", loc="left", fontsize=11)
        ends = draw_speed(right, own, "agreement", 100)
        right.set_ylim(0, 104)
        _labelled(right, ends, "% of tokens before the first difference")
    return figure


def reconstruction_sheet(rows: Sequence[Row]) -> Figure:
    """Draw the error of the experts' output by budget, over all nodes and over committed ones, and by layer."""
    figure, (every, committed, layers) = _sheet(3, (13.0, 4.3))
    lines = {rule: _mean_columns(own) for rule, own in _by(_where(rows, layer="mean"), "rule").items()}
    for axes, column, title in ((every, "error_all", "all nodes"), (committed, "error_committed", "committed nodes")):
        axes.set_title(f"Error of the experts' output, {title}", loc="left", fontsize=11)
        ends = draw_by_budget(axes, lines, column)
        axes.set_ylim(0, None)
        _labelled(axes, ends, "||y_B - y||² / ||y||²")
    budget = sorted({row["budget"] for row in rows})[min(1, len({row["budget"] for row in rows}) - 1)]
    layers.set_title(f"committed nodes by layer, B = {budget}", loc="left", fontsize=11)
    by_layer = [row | {"budget": row["layer"]} for row in rows if row["layer"] != "mean" and row["budget"] == budget]
    ends = draw_by_budget(
        layers, {r: _mean_columns(own) for r, own in _by(by_layer, "rule").items()}, "error_committed"
    )
    layers.set_ylim(0, None)
    _labelled(layers, ends, None, "sparse layer")
    return figure


def coactivation_sheet(counts: Mapping[int, np.ndarray]) -> Figure:
    """Draw the lift of pairs of experts, of each counted layer."""
    figure, panels = _sheet(len(counts), (3.7 * len(counts) + 0.9, 4.6))
    image = None
    for axes, (layer, pairs) in zip(panels, counts.items(), strict=True):
        lifted = lift(pairs)
        image = draw_lift(axes, lifted, order(lifted).tolist())
        axes.set_title(f"sparse layer {layer}", loc="left", fontsize=10)
    figure.suptitle("Experts selected by the same tokens", fontsize=11, x=0.01, ha="left")
    assert image is not None
    bar = figure.colorbar(
        image, ax=panels, shrink=0.8, ticks=range(-3, 4), label="frequency relative to independent choices"
    )
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    return figure


def acceptance_sheet(rows: Sequence[Row]) -> Figure:
    """Draw acceptance by depth, of every set and kind of text."""
    figure, (axes,) = _sheet(1, (8.2, 4.2))
    texts = {(name, kind): own for name, by in _by(rows, "set").items() for kind, own in _by(by, "text").items()}
    columns = ("accepted", "accepted_low", "accepted_high")
    axes.set_title("Rounds that commit a node of each depth, no budget (exact)", loc="left", fontsize=11)
    draw_acceptance(axes, {name: np.stack([_column(own, c) for c in columns]) for name, own in texts.items()})
    return figure


def finding_sheet(rows: Sequence[Row], paper: str) -> Figure:
    """Draw the divergence of every rule relative to MoE-Spec's own, at each budget of the findings."""
    own = [row for row in rows if row["against"] == paper]
    budgets = list(dict.fromkeys(row["budget"] for row in own))
    ranked = sorted(_where(own, budget=budgets[0]), key=lambda row: (not keeps_all(row["rule"]), -row["kl"]))
    order = [row["rule"] for row in ranked]
    figure, panels = _sheet(len(budgets), (4.4 + 3.6 * len(budgets), 1.6 + 0.3 * len(order)), sharey=True)
    for axes, budget in zip(panels, budgets, strict=True):
        axes.set_title(f"B = {budget}", loc="left", fontsize=10)
        draw_contrasts(axes, _where(own, budget=budget), order)
    figure.suptitle(f"Divergence of each rule, {own[0]['over']}", fontsize=11, x=0.01, ha="left", parse_math=False)
    return figure


def _sheet(
    panels: int, size: tuple[float, float], ratios: list[float] | None = None, columns: int | None = None, **how: Any
) -> tuple[Figure, list[Any]]:
    columns = columns or panels
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(-(-panels // columns), columns, squeeze=False, width_ratios=ratios, **how).ravel()
    for unused in axes[panels:]:
        unused.remove()
    return figure, list(axes[:panels])


def _labelled(axes: Any, ends: Sequence[End], ylabel: str | None, xlabel: str = "B, experts a layer may read") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel or "")
    axes.margins(x=0.02)
    open_axes(axes)
    label_ends(axes, ends)


def _where(rows: Sequence[Row], **columns: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in columns.items())]


def _by(rows: Sequence[Row], column: str) -> dict[Any, list[Row]]:
    return {value: _where(rows, **{column: value}) for value in dict.fromkeys(row[column] for row in rows)}


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _mean_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Average the numeric columns over sets, by budget. Intervals are of single sets, and left out if there are
    several."""
    by_budget = _by(rows, "budget")
    single = all(len(own) == 1 for own in by_budget.values())
    numbers = [n for n, v in rows[0].items() if isinstance(v, float) and (single or not n.endswith(("_low", "_high")))]
    means = {n: [float(np.mean([row[n] for row in own])) for own in by_budget.values()] for n in numbers}
    outputs = ["exact" if {row["output"] for row in own} == {"exact"} else "lossy" for own in by_budget.values()]
    return means | {"budget": list(by_budget), "output": outputs}
