"""Compiled programs: found again by shapes and settings, and let go before the system has no room for another."""

from pathlib import Path
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moespec_jax.runtime import programs
from moespec_jax.runtime.programs import Programs


def add(settings: int, params: jnp.ndarray, x: jnp.ndarray) -> jnp.ndarray:
    return params + x * settings


def scaled(settings: int, params: jnp.ndarray, x: jnp.ndarray) -> jnp.ndarray:
    return x * (params * settings).astype(x.dtype)


def run(kept: Programs, settings: int) -> float:
    return float(kept.run(add, settings, jnp.float32(1.0), jnp.float32(2.0)))


def test_a_program_is_compiled_once() -> None:
    kept = Programs()
    assert [run(kept, 3), run(kept, 3), run(kept, 4)] == [7.0, 7.0, 9.0] and len(kept) == 2
    spent = kept.compile_s
    run(kept, 3)
    assert kept.compile_s == spent


def test_programs_are_prepared_from_the_shapes_of_one_anothers_results() -> None:
    kept, one = Programs(), jnp.float32(1.0)
    x = jnp.ones(3, jnp.bfloat16)
    shapes = kept.prepare(scaled, 3, one, kept.prepare(scaled, 2, one, x))
    assert (shapes.shape, shapes.dtype) == ((3,), jnp.bfloat16) and not isinstance(shapes, jax.Array)
    result = kept.run(scaled, 3, one, kept.run(scaled, 2, one, x))
    assert len(kept) == 2 and (result.shape, result.dtype) == (shapes.shape, shapes.dtype)
    np.testing.assert_array_equal(np.asarray(result, np.float32), 6.0)


def test_an_error_of_the_compiler_is_raised_where_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: jax.stages.Lowered) -> None:
        raise MemoryError("RESOURCE_EXHAUSTED")

    kept = Programs()
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    kept.prepare(add, 1, jnp.float32(1.0), jnp.float32(2.0))
    with pytest.raises(MemoryError, match="RESOURCE_EXHAUSTED"):
        run(kept, 1)
    monkeypatch.undo()
    assert run(kept, 1) == 3.0, "and it is compiled again"


def test_an_interrupt_cancels_what_is_not_yet_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, begun, go_on, compiled, one = Programs(), Event(), Event(), list[int](), jnp.float32(1.0)
    compile_now = jax.stages.Lowered.compile

    def slowly(self: jax.stages.Lowered) -> jax.stages.Compiled:
        begun.set()
        go_on.wait()
        compiled.append(1)
        return compile_now(self)

    def interrupted(futures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jax.stages.Lowered, "compile", slowly)
    monkeypatch.setattr(programs, "wait", interrupted)
    kept.prepare(add, 2, one, one)
    begun.wait()
    with pytest.raises(KeyboardInterrupt):
        run(kept, 1)
    monkeypatch.undo()
    go_on.set()
    assert run(kept, 1) == 3.0 and len(compiled) == 1


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
