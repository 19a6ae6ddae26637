"""A ledger cut off at any byte goes on to what it would have become."""

import json
from pathlib import Path

import pytest

from moespec_jax.errors import RequestError
from moespec_jax.measure.ledger import Ledger

# JSON can be read deeper than Python may recurse.
DEEP = pytest.param('{"asked": ' + "[" * 700 + "]" * 700 + "}\n", id="deep")
ASKED = {"model": "m", "budgets": [8, 0.5]}
TASKS = {"a": {"x": 1.5}, "b": [1, 2], "ü": "text\nof two lines", "none": None}


def fill(path: Path) -> None:
    ledger = Ledger(path, ASKED)
    for name, value in TASKS.items():
        ledger.task(name, lambda value=value: value)


def test_cut_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for cut in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        fill(path)
        assert path.read_bytes() == whole, cut


def test_finished_tasks_are_not_run_again(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.jsonl")
    ledger = Ledger(tmp_path / "ledger.jsonl", ASKED)

    def never() -> None:
        raise AssertionError("run again")

    assert {name: ledger.task(name, never) for name in TASKS} == TASKS
    assert "a" in ledger and "c" not in ledger and len(ledger) == len(TASKS)


def test_values_come_back_as_a_continued_run_finds_them(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl", ASKED).put("t", (1, 2)) == [1, 2]


def test_a_ledger_with_older_names_is_continued(tmp_path: Path) -> None:
    """Its lines, the values in them and the budgets of its request are read under their present names."""
    before = {"coverage": "guarantee", "anchor": "none", "guarantee": 0.0, "faithfulness": 0.5}
    now = {"coverage": "substitute", "anchor": "likely", "anchor_probability": 0.0, "min_kept_weight": 0.5}
    value = {"experts_wanted": 5.5, "turns": [{"experts_loaded": 4.0}]}
    lines = [{"asked": {"ways": [{"budget": before}]}}, {"piece": "a", "value": value}]
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # as it was written, and as it was written again
        ledger = Ledger(path, {"ways": [{"budget": now}]})
        assert ledger.get("a") == {"experts_wanted": 5.5, "turns": [{"experts_read": 4.0}]} and len(ledger) == 1
    with pytest.raises(RequestError, match="ways was"):
        Ledger(path, {"ways": [{"budget": now | {"min_kept_weight": 0.4}}]})


def test_a_request_may_name_what_old_lines_were_called(tmp_path: Path) -> None:
    for _ in range(2):
        Ledger(tmp_path / "ledger.jsonl", {"prompts": {"piece": "of text"}})


def test_another_command_is_refused_and_leaves_the_file(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.jsonl")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(RequestError, match=r"budgets was \[8, 0.5\], is \[8\]"):
        Ledger(tmp_path / "ledger.jsonl", ASKED | {"budgets": [8]})
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"other": 1}\n', DEEP])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(RequestError, match="ledger.jsonl"):
        Ledger(tmp_path / "ledger.jsonl", ASKED)
    assert (tmp_path / "ledger.jsonl").read_text() == text
