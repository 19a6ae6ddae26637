"""The line of a terminal on which a command shows what takes seconds: its start, loading, compilation.

It is on standard error, only where that is a terminal, and until the first output of the command.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_shown = False


def begin_command() -> None:
    """Show that a command starts, if this process runs one; with `--json` nothing is shown."""
    global _shown
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if terminal and is_command(sys.orig_argv) and "--json" not in sys.orig_argv:
        _shown = True
        show("starting")


def show(text: str) -> None:
    """Replace the line; nothing removes it."""
    if _shown:
        # The cursor returns to the start of the line, so that the next output overwrites the text.
        print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing(text: str) -> Iterator[None]:
    """Show what the block does, and remove the line after it."""
    show(text)
    try:
        yield
    finally:
        show("")


def end() -> None:
    """Remove the line for good: output follows, on the same terminal perhaps."""
    global _shown
    show("")
    _shown = False


def is_command(words: Sequence[str]) -> bool:
    """Test whether the words that started Python (`sys.orig_argv`) run a module or a script of this package."""
    modules = [after for word, after in zip(words, words[1:], strict=False) if word == "-m"]
    scripts = [word for word in words[1:2] if Path(word).name == "moespec-generate"]
    return bool(scripts) or any(name.startswith("moespec_jax.") or name.startswith("convert.") for name in modules[:1])
