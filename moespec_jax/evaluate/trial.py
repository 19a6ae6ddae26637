"""Trials of answers that are code: the program of an answer runs in a separate process with resource limits.

The limits (time, memory, file size and, where the system supports it, number of processes) protect against programs
that exhaust the machine by mistake. They are not a sandbox: a program can read the user's files and use the network.
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
# Start of the code in a prompt, after instructions such as "Complete the code I provided."
_BEGIN = re.compile(r"^(?:from|import|def|class|async|@)\b", re.MULTILINE)
_DEFINED = re.compile(r"^(?:async )?def (\w+)", re.MULTILINE)
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Published prompts often lack their first imports. Names from typing are needed in signatures already.
_ASSUMED = "from typing import *\n"
# An example without expected output may also be a comparison that is true. The names are doctest's; a change of this
# text changes the identity of questions in ledgers.
_RUN_EXAMPLES = """import doctest as _doctest
class _Checker(_doctest.OutputChecker):
    def check_output(self, want, got, flags):
        return super().check_output(want, got, flags) or (not want and got == "True\\n")
_found = _doctest.DocTestParser().get_doctest(TEXT, globals(), "examples", None, 0)
assert _doctest.DocTestRunner(_Checker(), verbose=False).run(_found).failed == 0
"""


@dataclass(frozen=True)
class Trial:
    """A check of code.

    Fields:
        code: part of the program that is in the prompt.
        entry_point: name of the function.
        checks: program that runs after the answer, and fails unless the function is correct.
    """

    code: str
    entry_point: str
    checks: str


def read_trial(prompt: str, test: str | None, entry_point: str | None) -> Trial | None:
    """Make the trial of a prompt about code; None if it has no function, or no test of it.

    The checks are `test`, which defines `check` as in HumanEval, or else the examples in the docstring of
    `entry_point`, by default the last function of the prompt.
    """
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
    """Make the program of an answer.

    The answer is its first fenced block of code, or its whole text. If it defines the function, it follows the imports
    and helpers of the prompt; otherwise it continues the prompt's code, and is cut where the function ends.
    """
    fenced = _FENCED.search(answer)
    whole = answer if fenced is None else fenced.group(1)
    if trial.entry_point in _DEFINED.findall(whole):
        return f"{_preamble(trial)}\n{whole}"
    lines = whole.split("\n")
    first = trial.code.endswith("\n")  # otherwise the answer continues a line, whose indentation is in the prompt
    end = next((i for i, line in enumerate(lines) if (i or first) and line[:1].strip()), len(lines))
    return trial.code + "\n".join(lines[:end])


def passes(trial: Trial, program: str) -> bool:
    """Test whether a program passes the trial, in a separate process.

    Raises:
        RequestError: the system has no resource limits.
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
            output, _ = process.communicate(f"{_ASSUMED}{program}\n\n{trial.checks}".encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(process)
    return process.returncode == 0 and output.decode(errors="replace") == word


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all processes of its group, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.communicate()


def _preamble(trial: Trial) -> str:
    """Cut the prompt's code before the function: imports and helpers."""
    start = re.search(rf"^(?:async )?def {re.escape(trial.entry_point)}\b", trial.code, re.MULTILINE)
    return "" if start is None else trial.code[: start.start()]


def _examples(code: str, name: str) -> str | None:
    """Make a program that runs the examples of a function's docstring; None without examples."""
    text = _docstring(code, name) or ""
    try:
        examples = doctest.DocTestParser().get_examples(text)
    except ValueError:
        return None
    return _RUN_EXAMPLES.replace("TEXT", repr(text)) if examples else None


def _docstring(code: str, name: str) -> str | None:
    """Find the docstring of a function; the code may end within the function, and is cut to lines that parse."""
    lines = code.split("\n")
    for end in range(len(lines), 0, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes in the prompt
                nodes = ast.walk(ast.parse("\n".join(lines[:end])))
        except (SyntaxError, ValueError):
            continue
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == name]
        return ast.get_docstring(functions[-1]) if functions else None
    return None
