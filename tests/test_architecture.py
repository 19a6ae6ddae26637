"""Folders import only from folders above them, and importing the package loads nothing that decoding does not need."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moespec_jax"

# From the bottom of the stack to its top; what shares a line does not import from each other. "" is the package itself.
ORDER = [
    {"errors", "status_line"},
    {"files", "forms"},
    {"config"},
    {"dflash_config"},
    {"parallel"},
    {"nn"},
    {"checkpoint", "decoding"},
    {"runtime"},
    {""},
    {"cli", "__main__"},
    {"generate", "measure"},
    {"bench", "chat", "evaluate", "plan", "study", "train", "tune"},
    {"demo"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# A result names the version it was made with, which it asks the package for when it is made.
ALLOWED = {("runtime.results", "")}


def module_name(path: Path) -> str:
    """`nn.experts.cpu` for `moespec_jax/nn/experts/cpu.py`; the empty name for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Modules of this package imported anywhere in a module, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {n if n.removeprefix("moespec_jax.") in FILES else str(node.module) for n in whole}
    inside = {n.removeprefix("moespec_jax").removeprefix(".") for n in names if n.split(".")[0] == "moespec_jax"}
    return {n for n in inside if (name, n) not in ALLOWED}


def folder(name: str) -> str:
    return name.split(".")[0]


def test_every_folder_has_its_place() -> None:
    assert {folder(name) for name in FILES} == set(LEVEL)


@pytest.mark.parametrize("name", FILES)
def test_modules_import_from_folders_above_only(name: str) -> None:
    own = folder(name)
    wrong = {n for n in imported(name) if folder(n) != own and LEVEL[folder(n)] >= LEVEL[own]}
    assert not wrong, f"{name or 'moespec_jax'} imports {', '.join(sorted(wrong))}, which the order puts after it"


def test_no_import_circle() -> None:
    TopologicalSorter({name: imported(name) for name in FILES}).prepare()


@pytest.mark.parametrize("name", FILES)
def test_no_module_has_the_name_of_one_of_the_standard_library(name: str) -> None:
    """`cd` into a folder, and `import profile` would find ours."""
    assert name.split(".")[-1] not in sys.stdlib_module_names - {"__main__"}


def test_every_folder_describes_itself_in_one_line() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc and "\n" not in doc.partition("\n\n")[0], path


@pytest.mark.parametrize("name", FILES)
def test_of_flax_only_struct_is_used(name: str) -> None:
    """`import flax` loads linen by itself; nnx, and linen by name, stay out."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flax":
            assert node.module == "flax" and [alias.name for alias in node.names] == ["struct"]
        assert not (isinstance(node, ast.Import) and any(alias.name.startswith("flax") for alias in node.names))


@pytest.mark.parametrize("module", ["moespec_jax", "moespec_jax.generate"])
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "optax", "orbax", "flax.nnx", "transformers", "matplotlib", "tensorflow", "beartype"]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
