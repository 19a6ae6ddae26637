"""Notebooks run from beginning to end in a fresh kernel, say what their prose says, and are committed as they ran."""

import base64
import importlib.util
import re
import struct
import tomllib
import types
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from notebooks.run import HERE, execute

ROOT = Path(__file__).parent.parent
# How many pictures each shows.
PICTURES = {"quick_start": 2, "budget_study": 3, "convert_and_run": 1, "train_draft_head": 2}
# What a notebook may write to standard error: progress, and what a command notes.
SPOKEN = re.compile(r"^(\s*\d+%\|.*|note: .*|)$")
MACHINE = re.compile(r"/(tmp|home|root|Users|work|var|private|mnt|opt|usr)/|site-packages|[A-Z]:\\\\|\\\\Users")
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [base64.b64decode(picture) for picture in found]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stdout")


def test_these_are_all_notebooks() -> None:
    assert {path.stem for path in HERE.glob("*.ipynb")} == set(PICTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_notebook_runs(name: str, tmp_path: Path) -> None:
    ran = execute(HERE / f"{name}.ipynb", tmp_path, ENVIRONMENT)
    # `%run` shows an error and goes on.
    assert not [o for o in outputs(ran) if o.output_type == "error"]
    said = [line for o in outputs(ran) if o.get("name") == "stderr" for line in re.split(r"[\r\n]", o.text)]
    assert not [line for line in said if not SPOKEN.match(line)]
    assert len(pictures(ran)) == PICTURES[name]
    PROSE[name](printed(ran))


def quick_start_says(text: str) -> None:
    assert "same tokens: True" in text
    assert re.search(r"plain +95 passes .* exact: True", text) and re.search(r"speculative .* exact: True", text)
    assert "of 32, exact: False" in text


def budget_study_says(text: str) -> None:
    found = {(r, int(b)): (float(kl), float(g)) for r, b, kl, g in re.findall(
        r"(\S+) +B = +(\d+): divergence ([\d.]+), .*, ([\d.]+) tokens a round", text
    )}  # fmt: skip
    assert len(found) == 15
    for budget in (6, 8, 12, 16):
        assert found["pruning", budget][0] < found["MoE-Spec", budget][0]
        assert found["default", budget][0] < found["MoE-Spec", budget][0]
    assert found["pruning", 6][1] < 0.9 * found["pruning", 32][1]
    assert all(found[rule, 32][0] == 0 for rule in ("MoE-Spec", "default", "pruning"))


def convert_and_run_says(text: str) -> None:
    assert "same tokens" in text and "bit for bit the same" in text


def train_draft_head_says(text: str) -> None:
    assert "the same bits" in text


PROSE = {
    "quick_start": quick_start_says,
    "budget_study": budget_study_says,
    "convert_and_run": convert_and_run_says,
    "train_draft_head": train_draft_head_says,
}


@pytest.mark.parametrize("name", PICTURES)
def test_notebook_is_committed_as_it_ran(name: str) -> None:
    notebook = committed(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error"]
    assert printed(notebook)
    shown = pictures(notebook)
    assert len(shown) == PICTURES[name]
    for picture in shown:
        width, height = struct.unpack(">II", picture[16:24])
        assert width >= 600 and height >= 200, "too small to be read"


@pytest.mark.parametrize("name", PICTURES)
def test_committed_notebook_names_no_machine(name: str) -> None:
    notebook = committed(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3" and set(notebook.metadata.language_info) == {"name"}
    for cell in notebook.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k != "image/png")]
        for text in texts:
            assert not MACHINE.search(text), text


@pytest.fixture
def installation() -> str:
    """Source of the first cell, which all notebooks share."""
    (first,) = {code_cells(committed(name))[0].source for name in PICTURES}
    return first


def run_where_missing(source: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run a cell where the package is not installed; returns its magics."""
    magics: list[tuple[str, str]] = []
    notebook = types.SimpleNamespace(run_line_magic=lambda name, line: magics.append((name, line)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: notebook})
    return magics


def test_without_an_address_the_first_cell_says_so(installation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is that of the project's metadata, where it has one."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    stated = re.findall(r"^REPOSITORY = (.+?)(?:  #.*)?$", installation, re.MULTILINE)
    assert stated == [f'"{urls["Repository"]}"' if "Repository" in urls else "None"]
    if stated == ["None"]:
        with pytest.raises(ModuleNotFoundError, match="no public address yet: run python -m pip install"):
            run_where_missing(installation, monkeypatch)


def test_with_an_address_the_first_cell_installs_from_it(installation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = 'REPOSITORY = "https://example.org/moespec_jax"'
    source = re.sub(r"^REPOSITORY = .*$", address, installation, count=1, flags=re.MULTILINE)
    ((name, line),) = run_where_missing(source, monkeypatch)
    assert name == "pip" and "{REPOSITORY}" in line and "moespec_jax[train,{runtime}] @ git+" in line
    monkeypatch.undo()
    exec(TransformerManager().transform_cell(installation), {})  # installed: it does nothing
