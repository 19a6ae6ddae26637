"""The status line: in a terminal and before the first output, and never among the output."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_tiny

from moespec_jax import status_line
from moespec_jax.generate import main
from moespec_jax.status_line import is_command, showing

ROOT = Path(__file__).parent.parent
CLEAR = "\r\x1b[K"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("python -m moespec_jax.generate --chat", True),
        ("python -X importtime -m moespec_jax.bench", True),
        ("python -m convert.check --model x", True),
        ("python /usr/bin/moespec-generate", True),
        ("python -m moespec_jax", False),
        ("python -m pytest -m moespec_jax.x", False),
        ("python script.py", False),
        ("python", False),
    ],
)
def test_only_commands_show_it(words: str, expected: bool) -> None:
    assert is_command(words.split()) is expected


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_line, "_shown", True)


def shown_texts(err: str) -> list[str]:
    """Texts that the line had, one after the other, in an output of nothing else; it is empty at the end."""
    *texts, last = [part.removesuffix("\r") for part in err.split(CLEAR)[1:]]
    assert last == ""
    return [text for text in texts if text]


@pytest.mark.usefixtures("shown", "fast_compile")
def test_loading_and_compiling_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(write_tiny(tmp_path)), "--prompt", "abc", "--max-new-tokens", "4"]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    line, table = err.split("\nmodel ")
    texts = shown_texts(line.rstrip("\n"))
    assert texts[0] == "loading the model" and set(texts[1:]) == {"compiling"} and "device" in table
    assert "\x1b" not in out and out.startswith("abc")
    # The first output has ended it: what compiles now would overwrite the text.
    assert main(flags) == 0
    assert CLEAR not in capsys.readouterr().err


@pytest.mark.usefixtures("fast_compile")
def test_nothing_is_shown_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(write_tiny(tmp_path)), "--prompt", "abc", "--max-new-tokens", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out


@pytest.mark.usefixtures("shown")
def test_the_line_goes_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), showing("loading"):
        raise ValueError
    assert capsys.readouterr().err == f"{CLEAR}loading\r{CLEAR}\r"


def on_terminal(*command: str) -> tuple[str, float, str]:
    """Text that a command prints to a terminal on standard error, the seconds until the first of it, and its output."""
    controller, terminal = pty.openpty()
    started = time.monotonic()
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    text, first = b"", 0.0
    while True:
        try:
            part = os.read(controller, 4096)
        except OSError:  # Linux: the other end is closed
            part = b""
        if not part:
            break
        first = first or time.monotonic() - started
        text += part
    os.close(controller)
    output, _ = run.communicate()
    assert run.returncode == 0
    return text.decode(), first, output


@pytest.mark.slow
def test_a_start_is_shown_within_a_second(tmp_path: Path) -> None:
    flags = ["--model", str(write_tiny(tmp_path)), "--prompt", "abc", "--max-new-tokens", "4"]
    command = [sys.executable, "-m", "moespec_jax.generate", *flags, "--compilation-cache", "none"]
    err, first, out = on_terminal(*command)
    assert [*dict.fromkeys(re.findall(r"\x1b\[K([a-z ]+)\r", err))] == ["starting", "loading the model", "compiling"]
    assert first < 1.0 and out.startswith("abc")
    err, _, out = on_terminal(*command, "--json")
    assert err == "" and out.startswith("{")
