"""Answers in code: the program that an answer makes, and whether it passes, in a process of its own with limits.

The limits keep an answer from using up the machine by mistake: seconds, memory, file sizes and, where the system
grants it, processes. They are no prison: what runs may read what you may read, and use the network.
"""

import ast
import doctest
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from moespec_jax.errors import RequestError

CPU_SECONDS, WALL_SECONDS, BYTES = 5, 15.0, 1 << 30
_LIMITED = Path(__file__).with_name("limited.py")
# Where a prompt's code begins, after words like "Complete the code I provided."
_BEGIN = re.compile(r"^(?:from|import|def|class|async|@)\b", re.MULTILINE)
_DEFINED = re.compile(r"^(?:async )?def (\w+)", re.MULTILINE)
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Prompts are handed around without their first imports, of which those from typing are missed at once.
_ASSUMED = "from typing import *\n"
# An example that expects nothing may also be a comparison that holds.
_RUN_EXAMPLES = """import doctest as _doctest
class _Checker(_doctest.OutputChecker):
    def check_output(self, want, got, flags):
        return super().check_output(want, got, flags) or (not want and got == "True\\n")
_found = _doctest.DocTestParser().get_doctest(TEXT, globals(), "examples", None, 0)
assert _doctest.DocTestRunner(_Checker(), verbose=False).run(_found).failed == 0
"""


@dataclass(frozen=True)
class Trial:
    """What code must do to pass: `code` is what the prompt gives of it, `checks` a program that fails unless the
    function `entry_point` does what it should."""

    code: str
    entry_point: str
    checks: str


def read_trial(prompt: str, test: str | None, entry_point: str | None) -> Trial | None:
    """The trial of a prompt for code: `test`, which defines `check` as HumanEval does, or without it the examples in
    the docstring of the prompt's last function. None where the prompt holds no function, or nothing to check it by."""
    begin = _BEGIN.search(prompt)
    code = "" if begin is None else prompt[begin.start() :]
    defined = _DEFINED.findall(code)
    name = entry_point or (defined[-1] if defined else None)
    if name is None:
        return None
    if test is not None:
        return Trial(code, name, f"{test}\ncheck({name})\n")
    examples = _examples(code, name)
    return None if examples is None else Trial(code, name, examples)


def complete(trial: Trial, answer: str) -> str:
    """The program that an answer makes: its first block of code in a chat's fences, or itself, where that defines the
    function; else the prompt's code with the answer behind it, up to what is no longer part of the function."""
    fenced = _FENCED.search(answer)
    whole = answer if fenced is None else fenced.group(1)
    if trial.entry_point in _DEFINED.findall(whole):
        return f"{_preamble(trial)}\n{whole}"
    lines = whole.split("\n")
    first = trial.code.endswith("\n")  # else the answer begins inside a line, which may begin anywhere
    end = next((i for i, line in enumerate(lines) if (i or first) and line[:1].strip()), len(lines))
    return trial.code + "\n".join(lines[:end])


def passes(trial: Trial, program: str) -> bool:
    """Whether a program passes, in a process of its own.

    Raises:
        RequestError: this system has no limits to run it under.
    """
    if os.name != "posix":
        raise RequestError("expected a POSIX system for --run-code: there are no limits to run answers under here")
    word = secrets.token_hex(16)
    command = [sys.executable, "-I", "-B", "-X", "utf8", str(_LIMITED), str(CPU_SECONDS), str(BYTES), word]
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            command, cwd=directory, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(f"{_ASSUMED}{program}\n\n{trial.checks}".encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            _end(process)
    return process.returncode == 0 and said.decode(errors="replace") == word


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.communicate()


def _preamble(trial: Trial) -> str:
    """What of the prompt's code comes before the function: imports and helpers."""
    start = re.search(rf"^(?:async )?def {re.escape(trial.entry_point)}\b", trial.code, re.MULTILINE)
    return "" if start is None else trial.code[: start.start()]


def _examples(code: str, name: str) -> str | None:
    """A program that runs the examples of a function's docstring."""
    text = _docstring(code, name) or ""
    try:
        found = doctest.DocTestParser().get_examples(text)
    except ValueError:
        return None
    return _RUN_EXAMPLES.replace("TEXT", repr(text)) if found else None


def _docstring(code: str, name: str) -> str | None:
    """Of a function, whose last lines may break off anywhere."""
    lines = code.split("\n")
    for end in range(len(lines), 0, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of somebody's backslashes
                nodes = ast.walk(ast.parse("\n".join(lines[:end])))
        except (SyntaxError, ValueError):
            continue
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == name]
        return ast.get_docstring(functions[-1]) if functions else None
    return None
