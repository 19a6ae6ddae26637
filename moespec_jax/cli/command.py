"""What every command line of this package shares: errors in one line, exit status, a cache of compiled programs."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from moespec_jax.decoding.budget_config import BudgetWarning
from moespec_jax.errors import CheckpointError, RequestError, one_line


class Parser(argparse.ArgumentParser):
    """Bad usage is reported like every other error: one line, exit status 2."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raise what `run_command` reports."""
        raise RequestError(f"{message} (see --help)")


class OutputError(Exception):
    """Standard output cannot be written."""


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parse and run; returns the exit status: 0, 2 for what the caller can fix, 130 when interrupted."""
    try:
        arguments = parser.parse_args(argv)
        use_compilation_cache(getattr(arguments, "compilation_cache", None))
        with warnings.catch_warnings():
            warnings.simplefilter("once", BudgetWarning)
            warnings.showwarning = _show_warning
            run(arguments)
    except (CheckpointError, RequestError) as error:
        # Messages may quote somebody else's words; an error stays one line, and commands a terminal nothing.
        print(f"error: {one_line(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200] or "the host has no more"
        print(f"error: expected model, cache and batch to fit the device's memory; {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        what = f"; {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        print(f"error: expected to read and write files{what}", file=sys.stderr)
        return 2
    except OutputError as error:
        # Python must not complain about what it could not write once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error.__cause__, BrokenPipeError):  # whoever read our output has gone: that is no error
            print(f"error: expected to write to standard output; {error}", file=sys.stderr)
            return 2
    return 0


def _show_warning(message: Warning | str, *_: object) -> None:
    """One line, as errors are."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def write_output(text: str) -> None:
    """Write to standard output at once, so that a failure shows here and not at exit."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise OutputError(error.strerror) from error


def use_compilation_cache(directory: str | None) -> None:
    """Keep compiled programs between starts, unless told otherwise by flag or by JAX's own variable."""
    if directory == "none" or (directory is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(directory or Path(base) / "moespec_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
