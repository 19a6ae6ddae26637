"""Conversations that a command leaves out: counted, and named with file and line."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from moespec_jax.errors import RequestError, UnusableConversation, one_line
from moespec_jax.files import write_text

SHOWN = 5
T = TypeVar("T")


class LeftOut:
    """Collects the errors of conversations that are left out.

    Args:
        file: receives a line for each; that of an earlier run is removed.
        strict: raise the first error instead.
    """

    def __init__(self, file: Path, strict: bool):
        self._file, self._strict = file, strict
        self._reasons: list[str] = []

    def __call__(self, error: UnusableConversation) -> None:
        """Leave out a conversation."""
        if self._strict:
            raise error
        self._reasons.append(one_line(str(error)))

    def report(self, items: Iterable[T]) -> Iterator[T]:
        """Pass on what is read, and report at the end what was left out of it.

        Raises:
            RequestError: everything was left out.
        """
        count, before = 0, len(self._reasons)
        if not before:
            self._file.unlink(missing_ok=True)
        for count, item in enumerate(items, 1):  # noqa: B007
            yield item
        reasons = self._reasons[before:]
        if not reasons:
            return
        total = count + len(reasons)
        if count == 0:
            raise RequestError(f"expected conversations to learn from; all {total} are left out: {reasons[0]}")
        write_text(self._file, "".join(f"{reason}\n" for reason in self._reasons))
        shown = "".join(f"  {reason}\n" for reason in reasons[:SHOWN])
        print(
            f"left out {len(reasons)} of {total} lines, which the chat template refuses or which have no answer"
            f" (all are in {self._file}):\n{shown}",
            end="", file=sys.stderr,
        )  # fmt: skip
