import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from chats import PLAIN, QWEN3, chat_model

from moespec_jax.cli.prompts import (
    DEFAULT_PROMPT,
    Prompt,
    encode_prompt,
    gather_prompts,
    parse_prompt_ids,
    read_prompt_file,
    read_prompts,
    read_tools_file,
    read_turns,
)
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.measure.prompt_sets import prompt_sets


def arguments(
    prompt: list[str] | None = None,
    prompt_text: list[str] | None = None,
    prompt_file: list[str] | None = None,
    prompt_ids: list[str] | None = None,
) -> argparse.Namespace:
    return argparse.Namespace(prompt=prompt, prompt_text=prompt_text, prompt_file=prompt_file, prompt_ids=prompt_ids)


def test_prompts_come_in_order_and_a_dash_reads_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("third\n\n  \nfourth\n", encoding="utf-8")
    given = arguments(prompt=["first", "-"], prompt_file=[str(file)])
    found = gather_prompts(given, io.StringIO("second\nline").read)
    assert found == [Prompt(text) for text in ("first", "second\nline", "third", "fourth")]


def test_a_file_can_be_one_prompt(tmp_path: Path) -> None:
    """A text keeps its line ends under any file name; it comes between those of --prompt and of --prompt-file."""
    whole, lines = tmp_path / "whole.jsonl", tmp_path / "lines.txt"
    whole.write_text("def add(a, b):\n\n    return\n", encoding="utf-8")
    lines.write_text("c\nd\n", encoding="utf-8")
    given = arguments(prompt=["a"], prompt_text=[str(whole)], prompt_file=[str(lines)])
    found = gather_prompts(given, io.StringIO().read)
    assert found == [Prompt(text) for text in ("a", "def add(a, b):\n\n    return\n", "c", "d")]
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in ((empty, "it is empty"), (binary, "it is not UTF-8 text"), (tmp_path, "Is a directory")):
        with pytest.raises(RequestError, match=f"^expected a prompt at .*; {reason}$"):
            gather_prompts(arguments(prompt_text=[str(path)]), io.StringIO().read)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("value", [TOOLS, {"tools": TOOLS}, {"functions": [TOOLS[0]["function"]]}])
def test_tools_reach_the_chat_template(value: Any, tmp_path: Path) -> None:
    """Tools of a file equal those of a conversation; a template without them and a text without one are refused."""
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(value))
    tools, model, prompt = read_tools_file(file), chat_model(tmp_path / "model", QWEN3), Prompt("hi")
    assert tools == TOOLS
    messages = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    own = read_turns(messages, "line 1")
    assert encode_prompt(model, prompt, chat=True, tools=tools) == encode_prompt(model, own, chat=False)
    assert encode_prompt(model, own, chat=False, tools=tools) == encode_prompt(model, own, chat=False)
    with pytest.raises(RequestError, match="expected one list of tools in line 1; it has its own beside --tools"):
        encode_prompt(model, own, chat=True, tools=[{"type": "function", "function": {"name": "other"}}])
    with pytest.raises(RequestError, match="--tools are parts of a conversation; expected --chat with them"):
        encode_prompt(model, prompt, chat=False, tools=tools)
    with pytest.raises(CheckpointError, match="expected a chat template that renders all .*; it leaves out the tools"):
        encode_prompt(chat_model(tmp_path / "plain", PLAIN), prompt, chat=True, tools=tools)


@pytest.mark.parametrize("text", ["{}", "[]", "{", "5", '{"tools": {}}'])
def test_a_file_without_tools_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(RequestError, match=r"^expected JSON with tools at [^\n]*tools.json: a list of definitions"):
        read_tools_file(tmp_path / "tools.json")


def test_without_any_prompt_there_is_the_built_in_one() -> None:
    assert gather_prompts(arguments(), io.StringIO("not read").read) == [Prompt(DEFAULT_PROMPT)]


def test_token_ids_alone_need_no_text() -> None:
    assert gather_prompts(arguments(prompt_ids=["1,2"]), io.StringIO().read) == []


def test_turns_are_texts_of_the_user(tmp_path: Path) -> None:
    """Several texts: the first is asked, and the others wait for its answer; a single one is a text."""
    file = tmp_path / "questions.jsonl"
    file.write_text('{"turns": ["one\\ntwo", "later"]}\n{"id": 7, "turns": ["drei ä"]}\n', encoding="utf-8")
    several, single = read_prompts(file)
    assert several.conversation is not None and several.later == ("later",)
    assert several.conversation.turns == [{"role": "user", "content": "one\ntwo"}]
    assert single == Prompt("drei ä") and read_prompt_file(file) == ["one\ntwo", "drei ä"]


HI, HELLO, WELL = ("user", "hi"), ("assistant", "hello"), ("user", "well?")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [dict(zip(("role", "content"), t, strict=True)) for t in (HI, HELLO, WELL)]},
         "[user]hi\n[assistant]hello\n[user]well?\n[assistant]"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}]},
         "[system]s\n[user]hi\n[assistant]"),
        ({"turns": ["hi", "well?"]}, "[user]hi\n[assistant]"),
        ({"turns": ["hi"]}, "hi"),
    ],
)  # fmt: skip
def test_conversations_are_rendered(tmp_path: Path, row: Any, text: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row))
    model = chat_model(tmp_path / "model")
    (prompt,) = read_prompts(file)
    assert model.decode(encode_prompt(model, prompt, chat=False)) == text
    if prompt.conversation is None:
        assert model.decode(encode_prompt(model, prompt, chat=True)) == "[user]hi\n[assistant]"
    elif "conversations" in row:
        with pytest.raises(RequestError, match="one system text in line 1"):
            encode_prompt(model, prompt, chat=True, system="be kind")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "end before the answer",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "turns": ["a"]}, "one of 'turns' and 'messages'"),
        ({"turns": ["a", 3]}, "list of texts 'turns'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(tmp_path: Path, row: Any, named: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"turns": ["fine"]}\n' + json.dumps(row))
    with pytest.raises(RequestError, match=f"{named}.*line 2 of|line 2 of.*{named}"):
        read_prompts(file)


@pytest.mark.parametrize("chat", [False, True])
def test_sets_of_prompts_have_conversations_and_first_turns(tmp_path: Path, chat: bool) -> None:
    """Prompts of the measuring commands: one a line, rendered where it is a conversation or a chat is asked for."""
    file = tmp_path / "q.jsonl"
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "so"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": said}, {"turns": ["one", "two"]})))
    given = argparse.Namespace(prompts=[f"mine={file}"], count=2, longest_prompt=96, chat=chat)
    model = chat_model(tmp_path / "model")
    texts = [model.decode(ids) for ids in prompt_sets(model, given)["mine"]]
    assert texts == ["[user]hi\n[assistant]hello\n[user]so\n[assistant]", "[user]one\n[assistant]" if chat else "one"]


def test_a_set_of_texts_has_no_messages(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(RequestError, match="a text in line 1"):
        read_prompt_file(file)


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
