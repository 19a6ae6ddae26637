"""Common behaviour of the commands: errors in one line, exit status, and a cache of compiled programs."""

import argparse
import gc
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from moespec_jax import __version__, status_line
from moespec_jax.cli.wide_table import fitted
from moespec_jax.decoding.budget_config import BudgetWarning
from moespec_jax.errors import CheckpointError, RequestError, one_line, platform_error
from moespec_jax.files import cache_directory, expanded


class Parser(argparse.ArgumentParser):
    """Parser of a command: it has `--version`, expands `~` in paths, and reports wrong usage like every other error, in
    one line with exit status 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, expanded)
        if self.add_help:
            self.add_argument("--version", action="version", version=f"moespec_jax {__version__}")

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raise an error that `run_command` reports."""
        raise RequestError(f"{message} (see --help)")


def count(text: str) -> int:
    """Parse the value of a flag that is a whole number of at least 1; the function's name is in the parser's errors."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


class OutputError(Exception):
    """Standard output cannot be written."""


def command_parser(module: str, description: str | None, epilog: str | None = None) -> Parser:
    """Make the parser of `python -m moespec_jax.MODULE`; line breaks of description and epilog are kept."""
    return Parser(
        prog=f"python -m moespec_jax.{module}", description=description, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse and run; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    status_line.show("")
    if status_line.is_command(sys.orig_argv):
        gc.freeze()  # what was imported stays: collections while programs are traced need not visit it
        gc.set_threshold(100_000)  # and they are rare, since most of what a trace makes stays
    try:
        arguments = parser.parse_args(argv)
        use_compilation_cache(getattr(arguments, "compilation_cache", None))
        with warnings.catch_warnings():
            warnings.simplefilter("once", BudgetWarning)
            warnings.showwarning = _show_warning
            run(arguments)
    except (CheckpointError, RequestError) as error:
        print(error_line(error), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError, AssertionError) as error:
        message = platform_error(error) or memory_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        what = f"; {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        print(f"error: expected to read and write files{what}", file=sys.stderr)
        return 2
    except OutputError as error:
        # Otherwise Python would try to flush standard output at exit, and report the error a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error.__cause__, BrokenPipeError):  # a reader that has closed the pipe is not an error
            print(f"error: expected to write to standard output; {error}", file=sys.stderr)
            return 2
    return 0


def error_line(error: BaseException) -> str:
    """Format an error for the terminal. Its message may quote text from files, which must not add lines or send control
    characters."""
    return f"error: {one_line(' '.join(str(error).split()))}"


def memory_error(error: BaseException) -> str | None:
    """Describe a lack of memory of host or device in one line; None for other errors."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    reason = " ".join(str(error).split())[:200] or "the host has no more"
    return f"expected model, cache and batch to fit the device's memory; {reason}"


def require_matplotlib(extra: str = "plots") -> None:
    """Check that matplotlib is installed, before anything is measured; modules that plot import it afterwards.

    Args:
        extra: optional dependencies of this package that contain it.

    Raises:
        RequestError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"expected matplotlib, which draws the figures: {install_line(extra)}")


def install_line(extra: str) -> str:
    """Command that installs an extra, in a clone of the repository."""
    return f'python -m pip install -e ".[{extra}]"'


def write_output(text: str) -> None:
    """Write to standard output and flush, so that a failure is raised here and not at exit.

    Raises:
        OutputError: it cannot be written.
    """
    status_line.end()
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise OutputError(error.strerror) from error


def write_tables(text: str) -> None:
    """Write a report; in a terminal, its tables are made to fit.

    Raises:
        OutputError: it cannot be written.
    """
    write_output(fitted(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def use_compilation_cache(directory: str | None) -> None:
    """Keep compiled programs in a directory, by default the user's cache; "none" keeps none.

    Without a directory, `JAX_COMPILATION_CACHE_DIR` has precedence over the default.
    """
    if directory == "none" or (directory is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return
    chosen = expanded(directory) if directory else cache_directory() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
