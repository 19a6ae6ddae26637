"""The tree is formatted, lint-free and well-typed: part of the tests, so that one command checks everything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["moespec_jax", "convert", "benchmarks", "notebooks", "tests"]


@pytest.mark.slow_except("format", "lint")
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "format", "--check", *SOURCES],
        ["ruff", "check", *SOURCES],
        ["pyright", "--pythonpath", sys.executable],
    ],
    ids=["format", "lint", "types"],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_files_and_functions_stay_short() -> None:
    """One file, one noun: at most 320 lines; a function's body at most 60."""
    import ast

    for path in sorted(p for source in SOURCES for p in (ROOT / source).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 320, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                length = node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
