"""The script that times real shapes on accelerators runs, at toy size, wherever there is none."""

import json
import sys

import pytest

from benchmarks import real_shapes


@pytest.mark.slow
def test_it_runs_at_toy_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model toy --trees 6/2/2 --budgets 0.25 --repeats 1 --accept-length 2".split()
    monkeypatch.setattr(sys, "argv", ["real_shapes", *arguments])
    assert real_shapes.main() == 0
    report = json.loads(capsys.readouterr().out)
    exact, budgeted = report["rows"]
    assert exact["budget"] is None and budgeted["budget"] == 4
    assert exact["experts_read"] == exact["experts_wanted"] > budgeted["experts_read"] <= 4
    assert exact["verify_over_exact"]["median"] == exact["simulated_speed_up_over_exact"]["median"] == 1.0
    assert all(
        row["verify_ms"]["min"] > 0 and row["simulated_speed_up_over_plain"]["min"] > 0 for row in report["rows"]
    )
