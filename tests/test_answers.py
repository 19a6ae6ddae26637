"""Answers are checked by their last number or by running them; code that misbehaves fails and harms nobody."""

import json
import math
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from chats import chat_model
from hypothesis import given
from hypothesis import strategies as st

from moespec_jax.cli.prompts import encode_prompt
from moespec_jax.errors import RequestError
from moespec_jax.evaluate import trial
from moespec_jax.evaluate.answers import Question, answered_number, read_questions
from moespec_jax.evaluate.intervals import paired, wilson
from moespec_jax.evaluate.trial import complete, passes, read_trial

PROMPT = '''Complete the code I provided.

import math


def double(x):
    """Twice as much.

    >>> double(2)
    4
    >>> double(3) == 6
    """
'''
RIGHT, WRONG = "    return 2 * x\n", "    return 2 + x\n"
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(5) == 10\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", "18"),
        ("#### 109", "109"),
        ("7 and 8\n#### $1,234.50 in all, of 3", "1234.50"),
        ("#### 5\n\nQuestion: 3\n#### 6", "5"),
        ("no number behind it: 4 ####", "4"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("-$5 or $-6", "-6"),
        ("10-7", "7"),
        ("(12)-4", "4"),
        ("= -3 %", "-3"),
        ("50%", "50"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,234,567.0", "1234567"),
        ("so .5", "0.5"),
        ("x2 = 4, y3", "4"),
        ("\\boxed{42}", "42"),
        ("007", "7"),
        ("abc x2", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert answered_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=2), st.sampled_from(["{}", "${}", "{}%", "({})", "{}."]))
def test_a_number_is_read_as_it_was_written(value: Decimal, how: str) -> None:
    """With commas or without, with currency or percent sign, after other numbers."""
    for text in (f"{value:,f}", f"{value:f}"):
        assert answered_number("2 of 7 make " + how.format(text)) == value


def test_wilsons_interval_solves_its_equation() -> None:
    """Its bounds are the shares p whose standard error puts the observed share 1.96 of them away."""
    for right, count in [(0, 10), (3, 10), (10, 10), (77, 200)]:
        for bound in wilson(right, count):
            distance = abs(right / count - bound)
            assert math.isclose(distance, 1.959964 * math.sqrt(bound * (1 - bound) / count), abs_tol=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_pairs_are_counted_and_their_chance_is_the_coins() -> None:
    first = [True] * 9 + [False] * 3 + [True] * 2 + [False]
    second = [False] * 9 + [True] * 3 + [True] * 2 + [False]
    found = paired(first, second)
    assert found[:4] == (2, 9, 3, 1)
    enumerated = 2 * sum(math.comb(12, k) for k in range(4)) / 2**12
    assert math.isclose(found.p, enumerated)
    assert paired([True, False], [True, False]) == (1, 0, 0, 1, 1.0)


@pytest.mark.parametrize("test", [None, CHECK])
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (RIGHT, True),
        (WRONG, False),
        (RIGHT + "\n\ndef other():\n    raise SystemExit\n\n\nraise ValueError\n", True),
        (RIGHT + "Sure! This doubles the number.", True),
        ("def double(x):\n    return math.trunc(2 * x)\n", True),
        ("Here you are:\n```python\ndef double(x):\n    return x + x\n```\nHope it helps.", True),
        ("```\n    return 2 * x\n```", True),
        ("```python\ndef double(x):\n    return x\n```", False),
        ("", False),
        ("    return (", False),
        ("    import sys; sys.exit(0)\n", False),
        ("    import os; os._exit(0)\n", False),
        ("    raise KeyboardInterrupt\n", False),
    ],
)
def test_code_passes_if_it_is_right(answer: str, right: bool, test: str | None) -> None:
    found = read_trial(PROMPT, test, None)
    assert found is not None and found.entry_point == "double" and found.code.startswith("import math")
    assert passes(found, complete(found, answer)) == right


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "block = bytes(1 << 32); return 2 * x",
        "open('large', 'wb').write(bytes(1 << 22)); return 2 * x",
        "while True: print('x' * 10000)",
        "import os; assert os.environ.get('SECRET') == 'seen'; return 2 * x",
        "import sys; assert len(sys.argv) > 1; return 2 * x",
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n    while True: pass",
    ],
)
def test_code_that_misbehaves_fails_soon(body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "seen")
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)
    monkeypatch.setattr(trial, "WALL_SECONDS", 1.5)
    monkeypatch.chdir(tmp_path)
    found = read_trial(PROMPT, CHECK, None)
    assert found is not None
    assert not passes(found, complete(found, f"    {body}\n"))
    assert list(tmp_path.iterdir()) == []


def test_what_code_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system lets it start anything: nothing goes on writing after the answer was judged."""
    monkeypatch.setattr(trial, "WALL_SECONDS", 1.0)
    late = tmp_path / "late"
    child = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    body = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); return 2 * x"
    found = read_trial(PROMPT, CHECK, None)
    assert found is not None
    passes(found, complete(found, f"    {body}\n"))
    time.sleep(1.8)
    assert not late.exists()


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NUMBER = {"turns": ["How many?"], "reference": ["They are 2 + 3.\n#### 5"]}
CODE = {"turns": [PROMPT], "reference": [RIGHT]}


def test_questions_of_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        NUMBER,
        NUMBER | {"reference": "1 or 2"},
        NUMBER | {"reference": ["none"]},
        CODE,
        CODE | {"reference": [WRONG]},
        CODE | {"turns": ["def f(x):\n"]},
        CODE | {"test": CHECK, "entry_point": "double"},
    )
    questions, left_out = read_questions(path, run_code=True)
    assert [q.number for q in questions] == [Decimal(5), Decimal(2), None, None]
    assert [q.is_right(RIGHT) for q in questions] == [False, True, True, True]
    assert left_out == {
        "no number in its reference": 1,
        "code whose own reference does not pass": 1,
        "code without tests": 1,
    }


def test_a_question_may_be_the_last_message_of_a_conversation(tmp_path: Path) -> None:
    """Its prompt is the whole conversation, also without --chat; of several turns the first is a text."""
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "How many?"}]
    rows = [{"messages": said, "reference": "5"}, NUMBER | {"turns": ["How many?", "And now?"]}]
    (asked, text), _ = read_questions(write(tmp_path / "q.jsonl", *rows), run_code=False)
    model = chat_model(tmp_path / "model")
    ids = [encode_prompt(model, question.as_prompt(), chat=False) for question in (asked, text)]
    assert [model.decode(i) for i in ids] == ["[system]s\n[user]How many?\n[assistant]", "How many?"]
    assert asked.is_right("5") and asked.prompt == text.prompt and repr(text) == repr(Question("How many?", Decimal(5)))


def test_code_is_run_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.subprocess, "Popen", None)
    questions, left_out = read_questions(write(tmp_path / "q.jsonl", NUMBER, CODE), run_code=False)
    assert questions == [Question("How many?", Decimal(5))]
    assert left_out == {"code, which is only run with --run-code": 1}
    with pytest.raises(RequestError, match=r"1: code, which is only run with --run-code"):
        read_questions(write(tmp_path / "code.jsonl", CODE), run_code=False)


@pytest.mark.parametrize(
    "text",
    ["{", '{"turns": ["a"]}', '{"turns": [], "reference": "1"}', '{"turns": "a", "reference": "1"}', "[1]", "7"],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(NUMBER) + "\n" + text + "\n")
    with pytest.raises(RequestError, match=r"line 2 of .*q\.jsonl"):
        read_questions(path, run_code=False)
    with pytest.raises(RequestError, match="there.jsonl"):
        read_questions(tmp_path / "there.jsonl", run_code=False)
