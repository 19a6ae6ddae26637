"""Hostile variants of good files, drawn by hypothesis, and the bounds within which a reader must be done with them."""

import copy
import json
import math
import os
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moespec_jax import BudgetWarning, RequestError
from moespec_jax.errors import CheckpointError

# Texts that json.dumps cannot write; they stand in its output as names.
_DEEP = {f"@deep {depth}@": "[" * depth + "]" * depth for depth in (3, 60, 900, 5000)}
_RAW = {'"@endless@"': "1e999", '"@digits@"': "9" * 5000, '"@half@"': "0." + "1" * 400}
_RAW |= {f'"{name}"': text for name, text in _DEEP.items()}
_NUMBERS = [0, -1, 1, 2, 3, 5, 64, 2**24, 2**31, 2**53 + 1, 2**63, 2**64, 10**12, 10**40, 10**400]
_NUMBERS += [-0.0, 0.5, -0.5, 1.0, 2.0, 1e-308, 1e30, 1e308, math.nan, math.inf, -math.inf]
_TEXTS = ["", "0", "2", "true", "null", "x" * 100_000, "\x00", "\x1b[2J", "\ud800", "../x.safetensors", "/etc/passwd"]
_TEXTS += [
    "a\nb",
    "..",
    "é\u2028",
    "{}",
    "qwen3_moe",
    "silu",
    "y" * 300 + ".safetensors",
    *(json.loads(k) for k in _RAW),
]
_OTHERS = [None, True, False, [], {}, [[]], [None], [0], [0, 0], ["full_attention"], {"": None}, [0] * 20_000, [-1.5]]
VALUES = (
    st.sampled_from([*_NUMBERS, *_TEXTS, *_OTHERS]).map(copy.deepcopy)
    | st.integers(-9, 400)
    | st.floats()
    | st.text(max_size=8)
)


# `HUNT=40 python -m pytest tests/test_mutated_inputs.py`: forty times as many examples, others in every run.
_HUNT = int(os.environ.get("HUNT", "0"))


def bounded_examples(count: int) -> settings:
    """The same examples every time, whatever ran before."""
    return settings(
        max_examples=count * max(1, _HUNT),
        derandomize=not _HUNT,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Hang(BaseException):
    """A reader took longer than any input deserves."""


@contextmanager
def within(declared: int, floor: int = 8 << 20, seconds: float = 10.0) -> Iterator[None]:
    """Nothing inside may take long, nor more memory at once than twice what the input declares, and a floor for what
    does not depend on it: a JSON parser's small objects, a buffer that is used again."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        # Here, so that an input that is refused is held to it too.
        assert peak <= 2 * declared + floor, f"{peak} bytes for an input of {declared}"


def outcome(read: Callable[[], Any], declared: int, floor: int = 8 << 20) -> Any:
    """What the reader gives, or None where it refuses the input as documented, in one line; nothing else may happen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        try:
            with within(declared, floor):
                return read()
        except CheckpointError as error:
            assert str(error).isprintable() and 10 < len(str(error)) < 2000
        except RequestError as error:
            assert "expected" in str(error)
    return None


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value; of long lists and objects to the first and last few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) <= 40 else keys[:8] + keys[-2:]:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


@st.composite
def json_values(draw: st.DrawFn, good: Any) -> Any:
    """The value with one to three of its parts replaced, dropped, renamed or added."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        branch = value
        for key in path:
            branch = branch[key]
        what = draw(st.sampled_from(["replace"] * 5 + ["drop", "rename", "add"]))
        if what in ("drop", "rename"):
            old = branch.pop(last)
        if what == "replace":
            branch[last] = draw(VALUES)
        elif isinstance(branch, dict) and what != "drop":
            branch[draw(st.text(max_size=6) | st.sampled_from(_TEXTS[6:12]))] = (
                old if what == "rename" else draw(VALUES)
            )
    return value


@st.composite
def json_files(draw: st.DrawFn, good: Any) -> bytes:
    """The bytes of a mutated JSON file: mostly its values, sometimes its keys written twice, sometimes its bytes."""
    value = draw(json_values(good))
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(name, raw)
    kind = draw(st.sampled_from(["values"] * 6 + ["twice", "bytes"]))
    if kind == "twice" and isinstance(good, dict):
        key = draw(st.sampled_from(sorted(good)))
        text = text.replace("{", f"{{{json.dumps(key)}: {json.dumps(draw(VALUES))}, ", 1)
    return draw(damaged(text.encode())) if kind == "bytes" else text.encode()


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """The bytes cut, extended, or with a few of them changed, repeated or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["change"] * 3 + ["cut", "insert", "repeat", "extend"]))
        if what == "cut":
            del data[place:]
        elif what == "change" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif what == "insert":
            data[place:place] = draw(
                st.sampled_from([b"\xff", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 3000, b'"'])
            )
        elif what == "repeat":
            data[place:place] = data[place : place + 40]
        elif what == "extend":
            data += draw(st.binary(min_size=1, max_size=40))
    return bytes(data)
