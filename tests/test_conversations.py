"""Conversations in every form: what reaches the chat template, what counts in training, what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import PLAIN, QWEN3, STRICT, chat_model

import moespec_jax.train.__main__ as train
from moespec_jax.checkpoint.chat import render
from moespec_jax.checkpoint.conversation import read_conversation
from moespec_jax.errors import RequestError, UnusableConversation
from moespec_jax.runtime.model import Model
from moespec_jax.train.left_out import LeftOut
from moespec_jax.train.records import read_samples
from moespec_jax.train.regenerate import read_prompts

Record = dict[str, Any]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
ASKED = [{"role": "user", "content": "one and two?"}]
CALLED = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
FINAL = {"role": "assistant", "content": "three"}


def write(path: Path, *records: Record) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def messages(*pairs: tuple[str, str]) -> Record:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def counted(model: Model, tmp_path: Path, *records: Record, **how: Any) -> list[str | None]:
    samples = read_samples(model, write(tmp_path / "data.jsonl", *records), **how)
    return [model.decode(sample.ids[sample.counts].tolist()) for sample in samples]


def text_of(model: Model, record: Record) -> str:
    found = read_conversation(record, "line 1 of a")
    assert found is not None
    return render(model.directory, found).text


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return chat_model(tmp_path_factory.mktemp("qwen"), QWEN3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return chat_model(tmp_path_factory.mktemp("plain"), PLAIN)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (messages(("assistant", "hello"), ("user", "hi"), ("assistant", "yes")), "hello\nyes\n"),
        (messages(("system", "be kind"), ("assistant", "hello"), ("user", "hi")), "hello\n"),
        (messages(("assistant", "a"), ("assistant", "b")), "a\nb\n"),
        (messages(("user", "a"), ("tool", "b"), ("assistant", "c"), ("function", "d"), ("assistant", "e")), "c\ne\n"),
        (messages(("developer", "be kind"), ("user", "a"), ("assistant", "b")), "b\n"),
        ({"conversations": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}]}, "b\n"),
        ({"messages": [*ASKED, {"role": "assistant", "content": [{"type": "text", "text": "b"}] * 2}]}, "bb\n"),
        ({"messages": [*ASKED, FINAL | {"weight": 0}, *ASKED, FINAL | {"content": "x", "weight": 1}]}, "x\n"),
        ({"messages": None, "conversations": [*ASKED, FINAL | {"tool_calls": None, "name": None}]}, "three\n"),
        (
            {"system": "be kind", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "b\n",
        ),
    ],
)
def test_every_answer_counts(plain: Model, tmp_path: Path, record: Record, said: str) -> None:
    """The first turn may be of any role, and so may those between."""
    assert counted(plain, tmp_path, record) == [said]


def test_every_answer_counts_where_earlier_turns_are_rendered_differently(qwen: Model, tmp_path: Path) -> None:
    """A thinking block stands before the last answer only, and reasoning after the last user's turn only."""
    three = messages(
        ("user", "1"), ("assistant", "ONE"), ("user", "2"), ("assistant", "TWO"), ("user", "3"), ("assistant", "IV")
    )
    end, empty = "<|im_end|>\n", "<think>\n\n</think>\n\n"
    assert counted(qwen, tmp_path, three) == [f"ONE{end}TWO{end}{empty}IV{end}"]
    assert counted(qwen, tmp_path, three, last_answer_only=True) == [f"{empty}IV{end}"]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'
    thought = [CALLED[0], CALLED[1] | {"reasoning": "hm"}, CALLED[2], FINAL]
    block = "<think>\nhm\n</think>\n\n"
    assert counted(qwen, tmp_path, {"messages": thought}) == [f"{block}{call}{end}{empty}three{end}"]
    followed = [*thought, *ASKED, FINAL | {"content": "so"}]
    assert counted(qwen, tmp_path, {"messages": followed}) == [f"{call}{end}three{end}{empty}so{end}"]


def test_what_stands_in_the_text_is_what_transformers_renders(qwen: Model) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(qwen.directory))
    turns = [*CALLED, FINAL | {"reasoning_content": "so"}]
    expected = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert "adds" in expected and '"b": "ü"' in expected and "<think>\nso" in expected
    for record in (
        {"messages": turns, "tools": [TOOL]},
        {"messages": turns, "tools": json.dumps([TOOL])},
        {"messages": turns, "functions": [TOOL["function"]]},
        {"messages": [*CALLED, FINAL | {"reasoning": "so"}], "tools": [TOOL]},
        {"messages": [ASKED[0], {"role": "assistant", "function_call": CALL["function"]}, *turns[2:]], "tools": [TOOL]},
        {
            "conversations": [
                {"from": "human", "value": "one and two?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "three", "reasoning_content": "so"},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
    ):
        assert text_of(qwen, record) == expected


def test_names_and_ids_reach_the_template(tmp_path: Path) -> None:
    fields = "{{ m.role }}/{{ m.name }}/{{ m.tool_call_id }}:{{ m.content }}{{ m.mood }}\n"
    template = "{% for m in messages %}" + fields + "{% endfor %}"
    turns = [ASKED[0] | {"name": "ann"}, {"role": "tool", "tool_call_id": "c1", "content": "3", "mood": "!"}, FINAL]
    text = text_of(chat_model(tmp_path, template), {"messages": turns})
    assert text == "user/ann/:one and two?\ntool//c1:3!\nassistant//:three\n"


@pytest.mark.parametrize(
    "arguments", ["call.arguments", "call.arguments | tojson", "(call.arguments | items | list)[0][1]"]
)
def test_arguments_as_texts_are_not_encoded_twice(tmp_path: Path, arguments: str) -> None:
    """Templates print a text of JSON, encode an object, or read its items."""
    called = "{% for call in m.tool_calls or [] %}<{% set call = call.function %}{{ ARGUMENTS }}>{% endfor %}"
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + called.replace("ARGUMENTS", arguments))
    text = '{"a": 1, "b": "ü"}'
    given = [ASKED[0], CALLED[1] | {"tool_calls": [{"function": {"name": "add", "arguments": text}}]}]
    expected = "<1>" if "items" in arguments else f"<{text}>"
    assert text_of(chat_model(tmp_path, template), {"messages": given}).endswith(f"[assistant]{expected}")


REFUSED = {
    "image_url": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "judge": [{"role": "judge", "content": "x"}],
    "no text": [*ASKED, {"role": "assistant", "content": None}],
    "both": [{"role": "user", "content": "x", "value": "y"}],
    "a name": [*ASKED, FINAL | {"tool_calls": [{"function": {"arguments": "{}"}}]}],
    "JSON": [*ASKED, {"from": "function_call", "value": "add 1"}],
    "0 or 1": [*ASKED, FINAL | {"weight": 0.5}],
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_no_template_can_be_given_is_refused_by_name(plain: Model, tmp_path: Path, named: str) -> None:
    with pytest.raises(RequestError) as raised:
        counted(plain, tmp_path, {"messages": [*ASKED, FINAL]}, {"messages": REFUSED[named]})
    assert named in str(raised.value) and f"of line 2 of {tmp_path / 'data.jsonl'}" in str(raised.value)


@pytest.mark.parametrize(
    "record",
    [{"images": ["a.png"]}, {"system": 5}, {"tools": "add"}, {"system": "two"}, {"text": "b"}, {"conversations": [1]}],
)
def test_fields_of_a_conversation_are_refused_by_name(plain: Model, tmp_path: Path, record: Record) -> None:
    given = messages(("system", "one"), ("user", "a"), ("assistant", "b")) | record
    with pytest.raises(RequestError, match=r"line 1 of .*data\.jsonl"):
        counted(plain, tmp_path, given)


@pytest.mark.parametrize(
    ("record", "lacks"),
    [
        (messages(("developer", "be kind"), ("user", "a"), ("assistant", "b")), "turn 1, whose role is 'developer'"),
        ({"messages": [*CALLED, FINAL]}, "tool_calls of turn 2"),
        ({"messages": [*ASKED, FINAL], "tools": [TOOL]}, "the tools"),
    ],
)
def test_what_a_template_ignores_is_refused_by_name(
    tmp_path: Path, qwen: Model, plain: Model, record: Record, lacks: str
) -> None:
    with pytest.raises(UnusableConversation, match=lacks):
        counted(qwen if "developer" in lacks else plain, tmp_path, record)


TWICE, UNANSWERED = messages(("user", "a"), ("user", "b"), ("assistant", "c")), messages(("user", "a"))
GOOD = messages(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize("bad", [TWICE, UNANSWERED, messages(("system", "s"), ("user", "a"), ("assistant", "b"))])
def test_refused_conversations_are_left_out_counted_and_named(
    tmp_path: Path, bad: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = chat_model(tmp_path / "model", STRICT), tmp_path / "left_out.txt"
    left_out = LeftOut(file, strict=False)
    read = read_samples(model, write(tmp_path / "data.jsonl", GOOD, bad, GOOD), leave_out=left_out)
    assert len(list(left_out.report(read))) == 2
    shown = capsys.readouterr().err
    assert "left out 1 of 3 lines" in shown and f"line 2 of {tmp_path / 'data.jsonl'}" in shown
    assert file.read_text().count("\n") == 1 and "line 2 of" in file.read_text()
    with pytest.raises(UnusableConversation, match="line 2 of"):
        list(read_samples(model, tmp_path / "data.jsonl", leave_out=LeftOut(file, strict=True)))
    again = LeftOut(file, strict=False)
    with pytest.raises(RequestError, match="all 2 are left out: .*line 1 of"):
        list(again.report(read_samples(model, write(tmp_path / "bad.jsonl", bad, bad), leave_out=again)))


def test_a_list_of_what_an_earlier_run_left_out_is_removed(tmp_path: Path) -> None:
    model, file = chat_model(tmp_path / "model", STRICT), tmp_path / "left_out.txt"
    data, good = write(tmp_path / "data.jsonl", GOOD, TWICE), write(tmp_path / "good.jsonl", GOOD, GOOD)

    def run(*paths: Path) -> None:
        left_out = LeftOut(file, strict=False)
        for path in paths:
            list(left_out.report(read_samples(model, path, leave_out=left_out)))

    run(data, good)
    assert file.read_text().count("\n") == 1, "the second file does not remove the lines of the first"
    run(good, good)
    assert not file.exists()
    run(good, data)
    assert file.read_text().count("\n") == 1
    run(good)
    assert not file.exists()


def test_regeneration_leaves_out_what_the_template_refuses(tmp_path: Path) -> None:
    model, file = chat_model(tmp_path / "model", STRICT), write(tmp_path / "data.jsonl", GOOD, TWICE, UNANSWERED)
    errors: list[UnusableConversation] = []
    prompts = list(read_prompts(model, file, 8, leave_out=errors.append))
    assert [model.decode(prompt) for prompt in prompts] == ["[user]a\n[assistant]"] * 2
    assert len(errors) == 1 and "line 2 of" in str(errors[0])


NOTHING = {
    "rows hold none": [{"response_ids": [1, 2]}, {"response_ids": [3]}],
    "its rows hold none": [{"prompt_ids": [1, 2, 3], "response_ids": []}],
    "all 2 are left out": [UNANSWERED, TWICE],
}


@pytest.mark.parametrize("held_out", [[], [{"text": ""}], [{"response_ids": [3]}], [UNANSWERED]])
def test_held_out_data_without_anything_to_measure_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: list[Record]
) -> None:
    model = chat_model(tmp_path / "model", STRICT, num_hidden_layers=4)
    data, held = write(tmp_path / "data.jsonl", GOOD), write(tmp_path / "held.jsonl", *held_out)
    argv = ["--model", str(model.directory), "--data", str(data), "--output", str(tmp_path / "run"), "--steps", "1"]
    argv += ["--boundaries", "1,2,3", "--length", "16", "--unroll", "2", "--batch", "1", "--held-out", str(held)]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "all 1 are left out" in err if held_out == [UNANSWERED] else "expected held-out data with tokens" in err


@pytest.mark.parametrize("message", NOTHING)
def test_data_without_anything_to_learn_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    model = chat_model(tmp_path / "model", STRICT, num_hidden_layers=4)
    data = write(tmp_path / "data.jsonl", *(NOTHING[message][:1] if "its" in message else NOTHING[message]))
    argv = ["--model", str(model.directory), "--data", str(data), "--output", str(tmp_path / "run"), "--steps", "1"]
    argv += ["--boundaries", "1,2,3", "--length", "16", "--unroll", "2", "--batch", "1"]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
