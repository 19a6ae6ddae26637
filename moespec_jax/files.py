"""Small files: JSON with one-line errors, and atomic writes."""

import contextlib
import gc
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moespec_jax.errors import CheckpointError

# The operating system's error number in messages of TensorStore (under orbax) and of safetensors.
_SYSTEM_ERROR = re.compile(r"os[_ ]error(?:_code='| )(\d+)")


# Parsed JSON takes many times the memory of its text.
_LARGEST_JSON = 64 << 20


def expanded(path: str | os.PathLike[str]) -> Path:
    """Make a path, with a home directory in place of `~`: a shell does not expand it in `--flag=~/file`."""
    return Path(os.path.expanduser(path))


def cache_directory() -> Path:
    """Directory of this package in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moespec_jax"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or not a JSON object.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(f"expected JSON of at most {_LARGEST_JSON} bytes in {path}; it has {size}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"expected a file {path.name} in {path.parent}; there is none") from None
    except NotADirectoryError:
        raise CheckpointError(f"expected a directory with a {path.name}; {path.parent} is a file") from None
    except OSError as error:
        raise CheckpointError(f"expected a readable file {path}; {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of too many digits, deep nesting
        raise CheckpointError(f"expected JSON in {path}; {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object in {path}; it holds a {type(value).__name__}")
    return value


def json_line(value: object) -> str:
    """Format a value as a line of JSON. NaN and infinities, which JSON does not have, become null."""
    try:
        return json.dumps(value, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_finite(value)) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: under a temporary name, then renamed."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name, which is renamed to `path` when the block succeeds and removed when it fails.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".incomplete")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert every error of a failed write into an `OSError` that names a file. Python's own may lack the name, and
    orbax and safetensors raise exceptions of other types.

    Raises:
        OSError: with the error's number, and `path` where the error names no file.
    """
    try:
        yield
        return
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
    # Release orbax's pending writes here: at exit they could not be closed, and would print errors.
    gc.collect()
    raise OSError(number, os.strerror(number), str(path))


def parse_numbers(text: str, place: str) -> tuple[int, ...]:
    """Parse integers such as `2,24,45`; errors name `place`, a flag or a file.

    Raises:
        CheckpointError: something between the commas is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CheckpointError(f"expected {place} as numbers like 2,24,45; got {text[:40]!r}") from None


def listing(names: Sequence[str]) -> str:
    """Format the first five names and the number of the others, for an error message."""
    return ", ".join(name[:200] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
