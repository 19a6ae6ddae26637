"""The small files of a checkpoint directory: JSON read with errors in one line, and written whole or not at all."""

import contextlib
import gc
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moespec_jax.errors import CheckpointError

# In what orbax's TensorStore and safetensors say when the system refuses to write, the number of the system's error.
_SYSTEM_ERROR = re.compile(r"os[_ ]error(?:_code='| )(\d+)")


# Parsed, JSON takes many times the memory of its text.
_LARGEST_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable, absurdly large or not a JSON object.
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
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a number of too many digits, endless nesting
        raise CheckpointError(f"expected JSON in {path}; {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object in {path}; it holds a {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name and rename it, so that `path` is never half a file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that `path` is never half a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        OSError: it cannot be written.
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
    """Makes one kind of error of all that say that the system refuses to write: those of Python may lack the file's
    name, orbax and safetensors have kinds of their own.

    Raises:
        OSError: with the error's number, and `path` where no file was named.
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
    # What orbax was writing beside it is let go of now: at exit it could not close, and would complain.
    gc.collect()
    raise OSError(number, os.strerror(number), str(path))


def parse_numbers(text: str, place: str) -> tuple[int, ...]:
    """Integers from `2,24,45`; `place` is the flag or file they stand in.

    Raises:
        CheckpointError: something between the commas is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CheckpointError(f"expected {place} as numbers like 2,24,45; got {text[:40]!r}") from None


def listing(names: Sequence[str]) -> str:
    """The first five names and how many more there are, for an error message."""
    return ", ".join(name[:200] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
