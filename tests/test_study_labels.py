"""Labels of a study's pictures: each rule is marked by its own setting, and by nothing else."""

import itertools
from typing import Any

import pytest
from tiny import write_tiny

from moespec_jax.checkpoint.read import load_config
from moespec_jax.config import DecoderConfig
from moespec_jax.study import report, sheets
from moespec_jax.study.figures import draw_contrasts, draw_speed
from moespec_jax.study.rules import FEW, PAPER, RULES, mark
from moespec_jax.study.style import LOOKS

EXACT = "path, squares, guarantee 0, faithfulness 1 (exact)"
EXPERTS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DecoderConfig:
    return load_config(write_tiny(tmp_path_factory.mktemp("model"), num_experts=EXPERTS))


def expected(rule: str, budget: int) -> str:
    """All experts are read, or every row that loses one is pruned and the root's precede."""
    fields = RULES[rule]
    prunes = fields.get("min_kept_weight", 0) == 1 and fields.get("anchor") in ("root", "likely")
    return "exact" if budget == EXPERTS or prunes else "lossy"


def test_marks_are_those_of_the_setting(config: DecoderConfig) -> None:
    for rule, budget in itertools.product(RULES, (3, 4, EXPERTS)):
        assert mark(rule, budget, config) == expected(rule, budget)


def texts(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def frontier(budgets: tuple[int, ...]) -> list[dict[str, Any]]:
    base = dict(set="one", text="own text", kl=0.1, kl_low=0.05, kl_high=0.2, accept_length=2.0)
    rows = [base | dict(rule=r, budget=b, output=expected(r, b)) for r in FEW for b in budgets]
    return [base | dict(rule="no budget", budget=None, output="exact"), *rows]


@pytest.mark.parametrize("budgets", [(3, 4), (4, EXPERTS), (EXPERTS,)])
def test_lines_are_exact_where_all_their_rows_are(budgets: tuple[int, ...]) -> None:
    rows = frontier(budgets)
    labels = set(texts(sheets.frontier_sheet(rows, "one"))) | set(texts(sheets.texts_sheet(rows)))
    for rule in FEW:
        exact = all(expected(rule, budget) == "exact" for budget in budgets)
        label = LOOKS[rule].label
        assert (f"{label}, exact" in labels) == exact and (label in labels) == (not exact)
    assert "no budget, exact" in labels
    notes = {(3, 4): "lossy where not marked exact", (4, EXPERTS): "lossy where not marked exact", (EXPERTS,): "exact"}
    assert report._note(rows) == notes[budgets]
    lossy = [row for row in rows if row["output"] == "lossy"]
    assert not lossy or report._note(lossy) == "lossy"


@pytest.mark.parametrize("times", [None, 2.0])
def test_contrasts_name_the_output_of_their_own_row(times: float | None) -> None:
    """Also where a divergence is too small for a ratio, which does not make a rule exact."""
    from matplotlib.figure import Figure

    rules = [rule for rule in FEW if rule != PAPER]
    bounds = None if times is None else (times / 2, times * 2)
    low, high = bounds or (None, None)
    rows = [
        dict(
            rule=r,
            against=PAPER,
            output=expected(r, 4),
            keeps_all_drafts=True,
            kl=1e-7,
            times=times,
            times_low=low,
            times_high=high,
        )
        for r in rules
    ]
    axes: Any = Figure().subplots()
    draw_contrasts(axes, rows, rules)
    found = {text.get_text() for text in axes.texts}
    if times is None:
        assert found == {"exact: 1e-07 nats", "lossy: 1e-07 nats"}
        for text in axes.texts:
            rule = rules[round(text.get_position()[1])]
            assert text.get_text().startswith(expected(rule, 4))
    else:
        assert [text.xy[1] for text in axes.texts] == [rules.index(EXACT)] and found == {"exact"}


@pytest.mark.parametrize("output", ["exact", "lossy"])
def test_speeds_are_marked_by_their_own_rows(output: str) -> None:
    from matplotlib.figure import Figure

    spread = dict(speed_median=1.0, speed_min=0.9, speed_max=1.1)
    rows = [
        dict(rule="plain", budget=None, output="exact") | spread,
        dict(rule="exact", budget=None, output=output) | spread,
    ]
    rows += [dict(rule=r, budget=4, output=expected(r, 4)) | spread for r in FEW]
    axes: Any = Figure().subplots()
    labels = {end.label for end in draw_speed(axes, rows, "speed_median")}
    assert "plain, exact" in labels and ("no budget, exact" in labels) == (output == "exact")
    assert "faithfulness 1, exact" in labels and "MoE-Spec" in labels
