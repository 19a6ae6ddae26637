"""The pages in docs run: their Python, block after block, prints what they say it prints."""

import contextlib
import functools
import io
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from driver import FAST_COMPILE

from moespec_jax import budget

DOCS = Path(__file__).parent.parent / "docs"
DEMO = Path(__file__).parent.parent / "moespec_jax" / "demo" / "target"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python\n" in page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """Every block of Python: its line, its text, and what the page says it prints: the block of text right after it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, flags=re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1], match[2]) for match in found]


@pytest.mark.skipif(not DEMO.exists(), reason="the embedded model is not there")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_in_turn_and_prints_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace a page, on a CPU, as a reader's Python is set up and not as the other tests are."""
    for table in ("SCORES", "CREDITS", "ANCHORS", "SIZES", "COVERAGES"):  # pages add to them
        monkeypatch.setattr(budget, table, dict(getattr(budget, table)))
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for line, block, said in blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                # Lines are numbered as in the page.
                exec(compile("\n" * (line - 1) + block, str(page), "exec"), names)
            assert said is None or printed.getvalue() == said, f"{page.name}, line {line}"
