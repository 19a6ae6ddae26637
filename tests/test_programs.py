"""Compiled programs: found again by shapes and settings, and let go before the system has no room for another."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moespec_jax.runtime import programs
from moespec_jax.runtime.programs import Programs


def add(settings: int, params: jnp.ndarray, x: jnp.ndarray) -> jnp.ndarray:
    return params + x * settings


def run(kept: Programs, settings: int) -> float:
    return float(kept.run(add, settings, jnp.float32(1.0), jnp.float32(2.0)))


def test_a_program_is_compiled_once() -> None:
    kept = Programs()
    assert [run(kept, 3), run(kept, 3), run(kept, 4)] == [7.0, 7.0, 9.0] and len(kept) == 2
    spent = kept.compile_s
    run(kept, 3)
    assert kept.compile_s == spent


def test_those_not_used_for_longest_make_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maps, most = tmp_path / "maps", tmp_path / "most"
    maps.write_text("line\n" * 10)
    most.write_text("30\n")
    monkeypatch.setattr(programs, "_MAPS", maps)
    monkeypatch.setattr(programs, "_MOST_MAPS", most)
    kept = Programs()
    for settings in (1, 2, 3):
        run(kept, settings)
    assert len(kept) == 3
    run(kept, 1)
    # More than half of 18: all are let go, for the count of maps in this file does not fall.
    most.write_text("18\n")
    assert run(kept, 4) == 9.0 and len(kept) == 1


def test_only_as_many_go_as_must(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Programs()
    for settings in (1, 2, 3):
        run(kept, settings)
    run(kept, 1)
    monkeypatch.setattr(programs, "_crowded", lambda: len(kept) > 2)
    run(kept, 4)
    spent = kept.compile_s
    # 2 was not used for longest; 1 and 3 are there still.
    run(kept, 1)
    run(kept, 3)
    assert kept.compile_s == spent and len(kept) == 3
    np.testing.assert_equal(run(kept, 2), 5.0)
    assert kept.compile_s > spent
