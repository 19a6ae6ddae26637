"""The pieces that a long command has finished, on disk, so that it goes on where it was cut off."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moespec_jax.errors import RequestError
from moespec_jax.files import write_text, writing

Piece = TypeVar("Piece")


class Ledger:
    """JSON lines: first what was asked, then one line for every finished piece, each written before the next begins.

    A line that was cut off in the middle is forgotten. Values are what JSON can hold and come back as JSON gives them,
    also in the run that made them, so that a continued run works with the same values as one that was not cut off.

    Raises:
        RequestError: the file holds something else that was asked, or is not such a file.
    """

    def __init__(self, path: Path, asked: dict[str, Any]):
        self._path = path
        self._pieces: dict[str, Any] = {}
        asked = json.loads(json.dumps(asked))
        lines = _whole_lines(path)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"asked": asked}) + "\n")
            return
        if not all(isinstance(line.get("piece", ""), str) and ("piece" in line) == ("value" in line) for line in lines):
            raise RequestError(f"expected {path} to be of this very command, or not to exist; it has other lines")
        before = lines[0].get("asked")
        if before != asked:
            raise RequestError(
                f"expected {path} to be of this very command, or not to exist; {_difference(before, asked)}"
            )
        self._pieces = {line["piece"]: line["value"] for line in lines[1:] if "piece" in line}
        # Without what was cut off, or the next line would be appended to it.
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def get(self, name: str) -> Any:
        """The value of a finished piece; None if it is not finished."""
        return self._pieces.get(name)

    def put(self, name: str, value: Any) -> Any:
        """Keep the value of a piece, on disk when this returns; returns it as a continued run would find it."""
        line = json.dumps({"piece": name, "value": value})
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._pieces[name] = json.loads(line)["value"]
        return self._pieces[name]

    def piece(self, name: str, make: Callable[[], Piece]) -> Piece:
        """The value of a piece, made if it is not finished."""
        return self._pieces[name] if name in self._pieces else self.put(name, make())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [json.loads(line) for line in text.split("\n")[:-1]]  # the last was cut off, or is empty
    except OSError as error:
        raise RequestError(f"expected {path} to be readable; {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected {path} to hold JSON lines; {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise RequestError(f"expected {path} to hold JSON objects, one a line")
    return lines


def _difference(before: Any, asked: dict[str, Any]) -> str:
    if not isinstance(before, dict):
        return "it says nothing of what was asked"
    names = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
    return "; ".join(f"{n} was {json.dumps(before.get(n))[:80]}, is {json.dumps(asked.get(n))[:80]}" for n in names[:3])
