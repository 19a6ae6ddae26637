"""Real processes, killed at chosen moments: what is left is the beginning of the whole result, and the same command
goes on to it bit for bit. At random moments, and of commands that keep a ledger too: `python -m benchmarks.kill`."""

import signal
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from benchmarks.kill import run
from benchmarks.kill_tasks import Contents, Task, contents, last_checkpoint, make_tasks, violations

# Of their own, and kept: a killed process may leave half a program, which only warns whoever reads it.
CACHE = Path(__file__).parent.parent / ".pytest_cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kill")
    cache = CACHE / f"{Path(str(jax.config.jax_compilation_cache_dir)).name}-kill"
    cache.mkdir(parents=True, exist_ok=True)
    (place / "xla").symlink_to(cache)
    return place


@pytest.fixture(scope="module")
def tasks(place: Path) -> dict[str, Task]:
    return make_tasks(place)


def whole(task: Task, place: Path) -> Contents:
    course = run(task, place / task.name / "whole", place)
    assert course.status == 0, course.stderr
    return contents(place / task.name / "whole")


def kill(task: Task, place: Path, now: Callable[[Path], bool]) -> Path:
    """Send SIGKILL as soon as `now` says so of the output; returns the output."""
    output = place / task.name / "killed"
    course = run(task, output, place, lambda seconds, changes: now(output))
    assert course.status == -signal.SIGKILL, course.stderr
    return output


def go_on(task: Task, place: Path, expected: Contents) -> None:
    course = run(task, place / task.name / "killed", place)
    assert course.status == 0, course.stderr
    assert contents(place / task.name / "killed") == expected


@pytest.mark.slow
def test_a_conversion_begins_anew(tasks: dict[str, Task], place: Path) -> None:
    task = tasks["to_orbax"]
    expected = whole(task, place)
    rest = place / "to_orbax" / "killed.incomplete"
    for piece in ("base", "layers/000"):
        output = kill(task, place, lambda output, piece=piece: (rest / "orbax" / piece).exists())
        assert not output.exists() and "expected a file config.json" in (task.refused(output) or "")
    # And if what was left was being removed when that was killed too.
    for path in rest.glob("orbax/layers/*"):
        path.rename(rest / path.name)
    (rest / "orbax" / "base").rename(rest / "base")
    go_on(task, place, expected)


@pytest.mark.slow
def test_training_goes_on_from_the_last_whole_checkpoint(tasks: dict[str, Task], place: Path) -> None:
    """Killed amid an asynchronous save, when three steps are saved, and again when the head is being written."""
    task = tasks["train"]
    expected = whole(task, place)
    output = kill(task, place, lambda output: any(output.glob("checkpoints/[4-7].*-tmp*/*/*")))
    step = last_checkpoint(output)
    assert step is not None and 3 <= int(step.name) < 8 and not violations(contents(output), expected, task.journals)
    assert (output / "log.jsonl").read_text() and task.refused(output)
    kill(task, place, lambda output: any((output / "head").glob("*")))
    assert not violations(contents(output), expected, task.journals)
    go_on(task, place, expected)
    assert not list(output.glob("checkpoints/*-tmp*"))
