import argparse
import io
from pathlib import Path

import pytest

from moespec_jax.cli.prompts import DEFAULT_PROMPT, gather_texts, parse_prompt_ids, read_prompt_file
from moespec_jax.errors import RequestError


def arguments(
    prompt: list[str] | None = None, prompt_file: list[str] | None = None, prompt_ids: list[str] | None = None
) -> argparse.Namespace:
    return argparse.Namespace(prompt=prompt, prompt_file=prompt_file, prompt_ids=prompt_ids)


def test_prompts_come_in_order_and_a_dash_reads_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("third\n\n  \nfourth\n", encoding="utf-8")
    given = arguments(prompt=["first", "-"], prompt_file=[str(file)])
    assert gather_texts(given, io.StringIO("second\nline").read) == ["first", "second\nline", "third", "fourth"]


def test_without_any_prompt_there_is_the_built_in_one() -> None:
    assert gather_texts(arguments(), io.StringIO("not read").read) == [DEFAULT_PROMPT]


def test_token_ids_alone_need_no_text() -> None:
    assert gather_texts(arguments(prompt_ids=["1,2"]), io.StringIO().read) == []


def test_json_lines_give_their_first_turn(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"turns": ["one\\ntwo", "later"]}\n{"id": 7, "turns": ["drei ä"]}\n', encoding="utf-8")
    assert read_prompt_file(file) == ["one\ntwo", "drei ä"]


def test_lines_are_split_at_newlines_only(tmp_path: Path) -> None:
    """A line separator or form feed inside a prompt, or raw in a JSON string, is text."""
    text, lines = tmp_path / "prompts.txt", tmp_path / "questions.jsonl"
    text.write_text("a\u2028b\x0cc\nd\n", encoding="utf-8")
    lines.write_text('{"turns": ["a\u2028b"]}\n', encoding="utf-8")
    assert read_prompt_file(text) == ["a\u2028b\x0cc", "d"]
    assert read_prompt_file(lines) == ["a\u2028b"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"turns": []}', '{"turns": "text"}', '{"turns": [3]}', '{"turn": ["a"]}']
)
def test_json_lines_without_a_turn_are_named_by_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('\ufeff{"turns": ["fine"]}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(RequestError, match="'turns' in line 3 of .*questions.jsonl"):
        read_prompt_file(file)


@pytest.mark.parametrize(("text", "ids"), [("5,17,9", [5, 17, 9]), ("5", [5]), (" 5 , 6", [5, 6]), ("-1", [-1])])
def test_prompt_ids(text: str, ids: list[int]) -> None:
    assert parse_prompt_ids(text) == ids


@pytest.mark.parametrize("text", ["", "5,,6", "5;6", "a", "1.5", "5,"])
def test_prompt_ids_that_are_no_integers(text: str) -> None:
    with pytest.raises(RequestError, match="expected --prompt-ids like 5,17,9; got"):
        parse_prompt_ids(text)
