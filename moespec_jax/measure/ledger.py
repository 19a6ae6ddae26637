"""A ledger: the finished tasks of a long command on disk, so that an interrupted command continues."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moespec_jax.decoding.budget_config import current_fields
from moespec_jax.errors import RequestError
from moespec_jax.files import write_text, writing

Value = TypeVar("Value")


class Ledger:
    """JSON lines: the request, then one line for each finished task, written to disk before the next task begins.

    An incomplete last line is dropped. Values must be JSON. They are returned as JSON reads them, even in the run that
    computed them, so that a continued run uses the same values as an uninterrupted one.

    Args:
        path: the file, which is created if missing.
        request: all inputs that the values depend on.

    Raises:
        RequestError: the file has another request, or is not a ledger.
    """

    def __init__(self, path: Path, request: dict[str, Any]):
        self._path = path
        self._tasks: dict[str, Any] = {}
        request = json.loads(json.dumps(request))
        lines = _whole_lines(path)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"asked": request}) + "\n")
            return
        if not all(isinstance(line.get("task", ""), str) and ("task" in line) == ("value" in line) for line in lines):
            raise RequestError(f"expected {path} to be of the same command, or not to exist; it has other lines")
        before = lines[0].get("asked")
        if not isinstance(before, dict) or _named(before) != _named(request):
            raise RequestError(
                f"expected {path} to be of the same command, or not to exist; {_difference(before, request)}"
            )
        self._tasks = {line["task"]: line["value"] for line in lines[1:] if "task" in line}
        # Drop an incomplete last line, to which the next one would be appended.
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, name: str) -> Any:
        """Value of a finished task; None if it is not finished."""
        return self._tasks.get(name)

    def put(self, name: str, value: Any) -> Any:
        """Write the value of a task to disk; returns it as JSON reads it."""
        line = json.dumps({"task": name, "value": value})
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._tasks[name] = json.loads(line)["value"]
        return self._tasks[name]

    def task(self, name: str, run: Callable[[], Value]) -> Value:
        """Value of a task; runs it if it is not finished."""
        return self._tasks[name] if name in self._tasks else self.put(name, run())


def digest(value: Any) -> str:
    """Hash a JSON value, such as prompts, by which a request names it: 16 hexadecimal digits of its sha256."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [_current_keys(json.loads(line)) for line in text.split("\n")[:-1]]  # the last is incomplete, or empty
    except OSError as error:
        raise RequestError(f"expected {path} to be readable; {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected {path} to hold JSON lines; {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise RequestError(f"expected {path} to hold JSON objects, one a line")
    # In older ledgers a task is a piece.
    return [{"task" if name == "piece" else name: value for name, value in line.items()} for line in lines]


def _current_keys(value: Any) -> Any:
    """Rename keys of values and budgets of older ledgers."""
    if isinstance(value, list):
        return [_current_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {"experts_read" if name == "experts_loaded" else name: _current_keys(v) for name, v in value.items()}
    return current_fields(value) if "coverage" in value else value


def _named(request: dict[str, Any]) -> dict[str, Any]:
    """Inputs that are set: older ledgers lack the names of newer ones."""
    return {name: value for name, value in request.items() if value is not None}


def _difference(before: Any, request: dict[str, Any]) -> str:
    if not isinstance(before, dict):
        return "it does not name its request"
    names = [name for name in {**before, **request} if before.get(name) != request.get(name)]
    return "; ".join(
        f"{n} was {json.dumps(before.get(n))[:80]}, is {json.dumps(request.get(n))[:80]}" for n in names[:3]
    )
