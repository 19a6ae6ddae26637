"""An editable install is a path in site-packages, which type checkers follow."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
SCRIPT = """from convert import make_parser
from moespec_jax import BudgetConfig, load

budget: BudgetConfig = BudgetConfig(8)
print(load, make_parser, budget.experts)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that pip installs for `pip install -e`, built from a copy: setuptools writes beside pyproject.toml."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("moespec_jax", "convert"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_it_is_one_path(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        directory = Path(archive.read(name).decode().strip())
        assert not [name for name in archive.namelist() if name.endswith(".py")], "an import hook"
    assert (directory / "moespec_jax" / "py.typed").exists() and (directory / "convert" / "py.typed").exists()


@pytest.mark.slow
def test_pyright_finds_both_packages(wheel: Path, tmp_path: Path) -> None:
    """In an environment of nothing else, from a script outside of the clone; and Python finds `convert`."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tmp_path / "script.py").write_text(SCRIPT)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import importlib.util as u; print(u.find_spec('moespec_jax').origin, u.find_spec('convert').origin)"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [str(python), "-c", where], cwd=tmp_path, env=bare, capture_output=True, text=True, check=True
    )
    assert "moespec_jax/__init__.py" in found.stdout and "convert/__init__.py" in found.stdout
    command = [sys.executable, "-m", "pyright", "--pythonpath", str(python), "script.py"]
    checked = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert "0 errors, 0 warnings" in checked.stdout, checked.stdout
