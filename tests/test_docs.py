"""The pages in docs run: their Python, block after block, prints what they say it prints."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import optax  # noqa: F401  # before `jax.jit` is replaced: its own programs are compiled inside others
import pytest
from driver import FAST_COMPILE
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

DOCS = Path(__file__).parent.parent / "docs"
DEMO = Path(__file__).parent.parent / "moespec_jax" / "demo" / "target"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python\n" in page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """Every block of Python: its line, its text, and what the page says it prints: the block of text right after it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, flags=re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1], match[2]) for match in found]


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.exists(), reason="the embedded model is not there")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_in_turn_and_prints_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace a page, on a CPU, as a reader's Python is set up and not as the other tests are."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for line, block, said in blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                # Lines are numbered as in the page.
                exec(compile("\n" * (line - 1) + block, str(page), "exec"), names)
            assert said is None or printed.getvalue() == said, f"{page.name}, line {line}"


@pytest.mark.parametrize("page", sorted([DOCS.parent / "README.md", *DOCS.glob("*.md")]), ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8"))
    for module in set(named) - {"pip", "pytest"}:
        assert importlib.util.find_spec(module) is not None, module


def test_messages_that_are_explained_exist() -> None:
    """Each quoted part of a message is in the package, where a line may end within it."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((DEMO.parent.parent).rglob("*.py")))
    messages = re.sub(r'"\n +f?"', "", sources)
    (table,) = re.findall(r"^## Messages\n(.*?)^## ", (DOCS / "robustness.md").read_text(), re.DOTALL | re.MULTILINE)
    cells = re.findall(r"^\| (`[^|]*)", table, re.MULTILINE)
    parts = [part for cell in cells for part in cell.split("`")[1::2]]
    assert len(parts) > 5 and not [part for part in parts if part not in messages]


def test_memory_variables_are_those_that_jaxlib_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in re.findall(
        r"^\| `(XLA_\w+)=(\S+)`", (DOCS / "gpu.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        monkeypatch.setenv(name, value)
    options = generate_pjrt_gpu_plugin_options()
    assert (options["memory_fraction"], options["preallocate"]) == (0.95, False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION"):
        generate_pjrt_gpu_plugin_options()


def test_xla_flags_that_are_named_are_known() -> None:
    """XLA ends a process over a flag that it does not know."""
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    flags = {flag for text in pages for flag in re.findall(r"--xla_\w+(?:=\w+)?", text)}
    assert flags
    for given, good in ((flags, True), ({"--xla_no_such_flag=true"}, False)):
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(sorted(given))),
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == good, done.stderr[-500:]
