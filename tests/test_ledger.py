"""A ledger cut off at any byte goes on to what it would have become."""

from pathlib import Path

import pytest

from moespec_jax.errors import RequestError
from moespec_jax.measure.ledger import Ledger

ASKED = {"model": "m", "budgets": [8, 0.5]}
PIECES = {"a": {"x": 1.5}, "b": [1, 2], "ü": "text\nof two lines", "none": None}


def fill(path: Path) -> None:
    ledger = Ledger(path, ASKED)
    for name, value in PIECES.items():
        ledger.piece(name, lambda value=value: value)


def test_cut_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for cut in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        fill(path)
        assert path.read_bytes() == whole, cut


def test_finished_pieces_are_not_made_again(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.jsonl")
    ledger = Ledger(tmp_path / "ledger.jsonl", ASKED)

    def never() -> None:
        raise AssertionError("made again")

    assert {name: ledger.piece(name, never) for name in PIECES} == PIECES
    assert "a" in ledger and "c" not in ledger and len(ledger) == len(PIECES)


def test_values_come_back_as_a_continued_run_finds_them(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl", ASKED).put("t", (1, 2)) == [1, 2]


def test_another_command_is_refused_and_leaves_the_file(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.jsonl")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(RequestError, match=r"budgets was \[8, 0.5\], is \[8\]"):
        Ledger(tmp_path / "ledger.jsonl", ASKED | {"budgets": [8]})
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"other": 1}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(RequestError, match="ledger.jsonl"):
        Ledger(tmp_path / "ledger.jsonl", ASKED)
    assert (tmp_path / "ledger.jsonl").read_text() == text
