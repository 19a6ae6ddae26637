"""Once every way to decode has been warmed up, other prompts of other lengths compile nothing, and are streamed."""

import pytest

from benchmarks.endurance import ONE_TURN, Compilations, endure, summary
from moespec_jax import load
from moespec_jax.measure.prompt_sets import held_out_pieces


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.endurance.LENGTHS", (33, 47, 64))
    model, compilations = load(), Compilations()
    pieces = held_out_pieces(model, 64, 64)
    warm = endure(model, pieces, compilations, ONE_TURN * 3 // 8)
    assert compilations.count > 10  # it does hear them
    report = summary(warm[-1], endure(model, pieces, compilations, 600, first=1))
    assert report["tokens"] >= 600 and report["programs_after_warm_up"] == report["compilations_after_warm_up"] == 0
