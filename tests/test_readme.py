"""README says what the committed results say, and its Python example runs."""

import re
from pathlib import Path

import pytest

from benchmarks.tables import README, render

DEMO = Path(__file__).parent.parent / "moespec_jax" / "demo" / "target"


def test_tables_are_those_of_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert render(text) == text, "run python -m benchmarks.tables"


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


@pytest.mark.skipif(not DEMO.exists(), reason="the embedded model is not there")
def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 20
