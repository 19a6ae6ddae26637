"""Training data: lines of every kind as tokens with what counts of them, rows packed from them, responses written."""

import functools
import itertools
import json
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import chat_model
from tiny import CONTEXT, byte_level_tokenizer

from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.runtime.model import Model
from moespec_jax.train.records import Sample, read_samples
from moespec_jax.train.regenerate import read_prompts, regenerate
from moespec_jax.train.rows import Rows, draft_vocabulary, pack

# The second drops what an assistant thought in all turns but the last, as Qwen3's does.
SAID = "{{ m.content }}"
RECENT = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]CONTENT\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def model_of(directory: Path, content: str = SAID, tokenizer: bool = True) -> Model:
    return chat_model(directory, TEMPLATE.replace("CONTENT", content), tokenizer=tokenizer)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return model_of(tmp_path / "model")


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def counted(model: Model, sample: Sample) -> str | None:
    return model.decode(sample.ids[sample.counts].tolist())


def test_text_and_ids(model: Model, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "a.jsonl",
        {"text": "naïve café"},
        "\n  \n",
        {"prompt_ids": [5, 17], "response_ids": [9, 2, 4]},
        {"response_ids": [3]},
        {"prompt_ids": [1, 2], "response_ids": []},
    )
    text, ids, bare, empty = read_samples(model, file)
    assert text.ids.tolist() == model.encode("naïve café") and text.counts.all()
    assert (ids.ids.tolist(), ids.counts.tolist()) == ([5, 17, 9, 2, 4], [False, False, True, True, True])
    assert (bare.ids.tolist(), bare.counts.tolist(), empty.counts.tolist()) == ([3], [True], [False, False])
    assert all(sample.ids.dtype == np.int32 and sample.counts.dtype == bool for sample in (text, ids, bare, empty))


def test_of_a_chat_the_assistants_turns_count(model: Model, tmp_path: Path) -> None:
    """Every one of them with what the template closes it with, and nothing else; in both spellings."""
    said = turns("how are you", "fine thanks", "and now", "still fine")
    system = [{"role": "system", "content": "be kind"}]
    names = {"user": "human", "assistant": "gpt"}
    other = [{"from": names[turn["role"]], "value": turn["content"]} for turn in said]
    file = write_lines(tmp_path / "a.jsonl", {"messages": system + said}, {"conversations": other})
    first, second = read_samples(model, file)
    assert counted(model, first) == counted(model, second) == "fine thanks\nstill fine\n"
    whole = "[user]how are you\n[assistant]fine thanks\n[user]and now\n[assistant]still fine\n"
    assert second.ids.tolist() == byte_level_tokenizer().encode(whole, add_special_tokens=False).ids
    assert model.decode(first.ids.tolist()) == "[system]be kind\n" + whole


def test_a_turn_that_the_template_rewrites_does_not_count(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", RECENT)
    file = write_lines(
        tmp_path / "a.jsonl",
        {"messages": turns("how", "<think>hm</think>fine", "and now", "<think>so</think>good")},
        {"messages": turns("how", "fine", "and now", "good")},
    )
    rewritten, kept = read_samples(model, file)
    assert counted(model, rewritten) == "<think>so</think>good\n"
    assert "hm" not in str(model.decode(rewritten.ids.tolist()))
    assert counted(model, kept) == "fine\ngood\n"


BAD = {
    "{": "line 2",
    "[1]": "line 2: it holds a list",
    '{"words": "x"}': "'text', 'messages' or 'response_ids' in line 2",
    '{"text": 5}': "'text', 'messages' or 'response_ids' in line 2",
    '{"messages": [{"role": "judge", "content": "x"}]}': "turns with a role",
    '{"messages": [{"role": "user", "content": 5}]}': "turns with a role",
    '{"messages": ["hi"]}': "turns with a role",
    '{"messages": []}': "expected 'text'",
    '{"messages": [{"role": "user", "content": "hi"}]}': "an assistant's turn",
    '{"response_ids": [320]}': "ids from 0 to 319 in line 2",
    '{"response_ids": [-1]}': "ids from 0 to 319",
    '{"response_ids": [true]}': "ids from 0 to 319",
    '{"response_ids": "abc"}': "ids from 0 to 319",
    '{"prompt_ids": 5, "response_ids": [1]}': "ids from 0 to 319",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_a_line(model: Model, tmp_path: Path, line: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"text": "good"}, line + "\n")
    with pytest.raises((RequestError, CheckpointError)) as raised:
        list(read_samples(model, file))
    assert BAD[line] in str(raised.value) and str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_cannot_be_read(model: Model, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}\n')
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin", "it is not UTF-8 text"),
    ):
        with pytest.raises(RequestError, match=reason):
            list(read_samples(model, path))


def test_without_a_tokenizer_only_ids(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", tokenizer=False)
    for line in ({"text": "a"}, {"messages": turns("a", "b")}):
        with pytest.raises(RequestError, match="has no tokenizer"):
            list(read_samples(model, write_lines(tmp_path / "a.jsonl", line)))
    assert len(list(read_samples(model, write_lines(tmp_path / "a.jsonl", {"response_ids": [1, 2]})))) == 1


@pytest.mark.parametrize("seed", range(20))
def test_packing_keeps_every_transition_once(seed: int) -> None:
    """All tokens differ, so that each can be found: of every sample, every two tokens in a row stand next to each other
    in one row and exactly once; one that fits is not cut; the order is kept; nothing else counts."""
    rng = np.random.default_rng(seed)
    length, unused = int(rng.integers(2, 9)), itertools.count(1)
    samples = []
    for size in rng.integers(0, 20, 12):
        ids = np.array([next(unused) for _ in range(size)], np.int32)
        samples.append(Sample(ids, rng.random(size) < 0.5))
    rows = pack(samples, length)
    assert rows.ids.shape == rows.counts.shape == (len(rows.ids), length)
    adjacent = Counter((int(a), int(b)) for row in rows.ids for a, b in itertools.pairwise(row))
    counts = {int(i): bool(c) for sample in samples for i, c in zip(*sample, strict=True)}
    for sample in samples:
        for a, b in itertools.pairwise(sample.ids.tolist()):
            assert adjacent[a, b] == 1
        places = [np.argwhere(rows.ids == i) for i in sample.ids] if 1 < len(sample.ids) <= length else []
        assert all(len(place) == 1 for place in places) and len({int(place[0, 0]) for place in places}) <= 1
    firsts = [int(i) for i in dict.fromkeys(rows.ids.ravel().tolist()) if i]
    assert firsts == sorted(firsts)
    for i, c in zip(rows.ids.ravel().tolist(), rows.counts.ravel().tolist(), strict=True):
        assert c == (counts[i] if i else False)


def test_batches_go_through_every_row_once_an_epoch() -> None:
    rows = Rows(np.arange(12)[:, None].astype(np.int32), np.ones((12, 1), bool))
    seen = [rows.batch(step, 4, seed=3) for step in range(6)]
    epochs = [np.concatenate([batch.ids[:, 0] for batch in seen[start : start + 3]]).tolist() for start in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2 and epochs[0] != epochs[1]
    again = rows.batch(4, 4, seed=3)
    assert (again.ids == seen[4].ids).all() and (rows.batch(4, 4, seed=4).ids != again.ids).any()
    assert len(rows.batch(0, 30, seed=0).ids) == 30


@pytest.mark.parametrize("size", [1, 5, 30, 40])
def test_draft_vocabulary_is_the_most_frequent_of_what_counts(size: int) -> None:
    """Of equally frequent ones the lowest; what does not count is not counted."""
    rng = np.random.default_rng(0)
    rows = Rows(rng.geometric(0.2, (6, 20)).clip(max=39).astype(np.int32), rng.random((6, 20)) < 0.5)
    often = Counter(rows.ids[rows.counts].tolist())
    expected = sorted(sorted(range(40), key=lambda i: (-often[i], i))[:size])
    given = draft_vocabulary(rows, 40, size)
    assert given.tolist() == expected and given.dtype == np.int32


def test_prompts_of_every_kind(model: Model, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "a.jsonl",
        {"text": "the cat sat on the mat"},
        {"prompt_ids": [5, 6, 7, 8], "response_ids": [1]},
        {"messages": turns("how", "fine", "and now", "good")},
    )
    text, ids, chat = read_prompts(model, file, 3)
    assert text == model.encode("the cat sat on the mat")[:3] and ids == [5, 6, 7]
    assert model.decode(chat) == "[user]how\n[assistant]fine\n[user]and now\n[assistant]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": ""}, f"1 to {CONTEXT - 1} tokens in line 1"),
        ({"prompt_ids": [1] * CONTEXT}, f"it has {CONTEXT}"),
        ({"prompt_ids": [1, "a"]}, "ids from 0 to 319 in line 1"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "a turn before the assistant's"),
    ],
)
def test_prompts_that_cannot_be_answered(model: Model, tmp_path: Path, line: Any, message: str) -> None:
    """They are refused before the first is answered."""
    with pytest.raises(RequestError, match=message):
        list(read_prompts(model, write_lines(tmp_path / "a.jsonl", line), 1000))


class Echo(Model):
    """Stands in for a model: answers every prompt with itself and its length, until it is stopped."""

    def __init__(self, calls: int = 100):
        self.calls, self.asked = calls, []

    def generate(self, prompts: list[list[int]], **_: Any) -> Any:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked.append(prompts)
        return types.SimpleNamespace(prompts=[types.SimpleNamespace(token_ids=[*p, len(p)]) for p in prompts])


def test_regeneration_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    prompts = [[i] * (1 + i % 3) for i in range(10)]
    run: Any = functools.partial(regenerate, prompts=prompts, batch=4, max_new_tokens=5, temperature=0.0)
    run(Echo(), output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Echo(calls=2), output=tmp_path / "cut")
    with (tmp_path / "cut").open("a") as file:
        file.write('{"prompt_ids": [8')
    rest = Echo()
    run(rest, output=tmp_path / "cut")
    assert (tmp_path / "cut").read_text() == (tmp_path / "whole").read_text()
    # Batches keep their size, for another would compile anew.
    assert rest.asked == [[prompts[8], prompts[9], prompts[9], prompts[9]]]
    records = [json.loads(line) for line in (tmp_path / "cut").read_text().splitlines()]
    assert records == [{"prompt_ids": p, "response_ids": [*p, len(p)]} for p in prompts]
    run(rest, output=tmp_path / "cut")
    assert len(rest.asked) == 1


def test_regeneration_refuses_responses_to_other_prompts(tmp_path: Path) -> None:
    run: Any = functools.partial(regenerate, Echo(), batch=2, max_new_tokens=5, temperature=0.0)
    run(prompts=[[1], [2], [3]], output=tmp_path / "out")
    before = (tmp_path / "out").read_text()
    with pytest.raises(RequestError, match="responses to the same prompts"):
        run(prompts=[[1], [7], [3], [4]], output=tmp_path / "out")
    assert (tmp_path / "out").read_text() == before
    with pytest.raises(RequestError, match="expected to write to"):
        run(prompts=[[1]], output=tmp_path / "none" / "out")
