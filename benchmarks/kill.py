"""What is left of a command that is killed at a random moment, and does the same command go on to the same result?

    python -m benchmarks.kill --kills 60 --out benchmarks/results

Every command runs twice undisturbed, which must give the same, and then again and again in a new place, where it is
sent SIGKILL one to four times before it may finish. A kill comes after a random share of the undisturbed run's time, or
shortly after a random one of the changes that it makes to its files, so that it often falls amid writing. After every
kill what is on disk must be the beginning of the whole run's, no more and nothing else, and if it claims to be a result
it must load or be refused in a line; at the end all must be the whole run's (see `benchmarks.kill_tasks`).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.kill_tasks import Contents, Task, contents, make_tasks, violations
from moespec_jax.runtime.results import versions

_LOOK_S = 0.002
MOST_IN_A_ROW = 4
# Takes the seconds since the start and the changes to files since; says whether now is the moment.
Moment = Callable[[float, int], bool]


class Course(NamedTuple):
    """How a run went: exit status, seconds, changes to its files, what it wrote to standard error."""

    status: int
    seconds: float
    changes: int
    stderr: str


def main() -> int:
    """Kill, compare, and write `kill.json`, or print it; exit status 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write kill.json to (default: print)")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of commands")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        tasks = {n: t for n, t in make_tasks(place).items() if not options.only or n in options.only}
        shares = sum(task.share for task in tasks.values())
        report: dict[str, Any] = {"seed": options.seed, "versions": versions(), "tasks": {}}
        for name, task in tasks.items():
            chance = random.Random(f"{options.seed} {name}")
            report["tasks"][name] = study(task, place, round(options.kills * task.share / shares), chance)
            print(json.dumps({name: {k: v for k, v in report["tasks"][name].items() if k != "each"}}), flush=True)
    report |= totals(report["tasks"])
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "kill.json").write_text(text)
    return 0 if report["all_as_they_must_be"] else 1


def totals(tasks: dict[str, Any]) -> dict[str, Any]:
    """Sums over the commands."""
    kills = [kill for task in tasks.values() for kill in task["each"]]
    return {
        "kills": len(kills),
        "left": dict(Counter(kill["left"] for kill in kills)),
        "resumed_runs": sum(task["resumed_runs"] for task in tasks.values()),
        "resumed_runs_equal": sum(task["resumed_runs_equal"] for task in tasks.values()),
        "wrong": sum(bool(kill["wrong"]) for kill in kills),
        "all_as_they_must_be": all(task["undisturbed_runs_equal"] and not task["problems"] for task in tasks.values()),
    }


def study(task: Task, place: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """So many kills of one command, and what came of them."""
    base = place / task.name
    courses = [run(task, base / name, place) for name in ("first", "whole")]
    whole, course = contents(base / "whole"), courses[1]
    equal = contents(base / "first") == whole
    problems = [line for c in courses for line in _wrong_end(c)]
    each, runs, same = [], 0, 0
    while len(each) < kills and not problems:
        output = base / f"run{runs}"
        for record in _kill_in_a_row(task, output, place, whole, course, kills - len(each), chance):
            each.append(record)
        last = run(task, output, place)
        # A command that was killed after its last write has nothing more to do, and says so.
        finished = last.status == 0 or (last.status == 2 and "new or empty" in last.stderr and task.refused)
        found = contents(output)
        runs, same = runs + 1, same + (found == whole)
        problems += [] if finished else _wrong_end(last)
        problems += [] if found == whole else [f"run {runs - 1} ends with other contents: {_differing(found, whole)}"]
        shutil.rmtree(output, ignore_errors=True)
    problems += [f"a kill left {kill['wrong']}" for kill in each if kill["wrong"]]
    return {
        "command": " ".join(("python -m", *(Path(w).name if Path(w).exists() else w for w in task.command))),
        "seconds": round(course.seconds, 2), "changes_to_files": course.changes, "undisturbed_runs_equal": equal,
        "kills": len(each), "left": dict(Counter(kill["left"] for kill in each)), "resumed_runs": runs,
        "resumed_runs_equal": same, "problems": problems, "each": each,
    }  # fmt: skip


def _kill_in_a_row(
    task: Task, output: Path, place: Path, whole: Contents, course: Course, most: int, chance: random.Random
) -> Iterator[dict[str, Any]]:
    for number in range(min(most, chance.randint(1, MOST_IN_A_ROW))):
        kind, moment = draw_moment(course, number, chance)
        killed = run(task, output, place, moment)
        if killed.status != -signal.SIGKILL:
            return  # it was faster
        found = contents(output)
        yield {
            "moment": kind, "after_s": round(killed.seconds, 3), "after_changes": killed.changes,
            "left": _left(task, output, found, whole), "wrong": violations(found, whole, task.journals),
            "refused": (task.refused(output) or "").replace(f"{place}/", "") or None,
        }  # fmt: skip


def draw_moment(course: Course, number: int, chance: random.Random) -> tuple[str, Moment]:
    """By the clock, or soon after a change; the more often a run was killed the less it has to do."""
    if chance.random() < 1 / 3:
        at = chance.uniform(0.1, 1.0) * course.seconds
        return "clock", lambda seconds, changes: seconds >= at
    change, wait = chance.randint(1, max(1, course.changes // (number + 1))), chance.choice([0, 0, 0.005, 0.02, 0.1])
    since: list[float] = []

    def moment(seconds: float, changes: int) -> bool:
        if changes >= change and not since:
            since.append(seconds)
        return bool(since) and seconds >= since[0] + wait

    return "change of files", moment


def run(task: Task, output: Path, place: Path, moment: Moment = lambda seconds, changes: False) -> Course:
    """The command to its end or to the moment."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    output.parent.mkdir(exist_ok=True)
    log = place / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", *task.command, "--output", str(output)],
            env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    started, before, changes = time.monotonic(), _sizes(output), 0
    while process.poll() is None:
        now = _sizes(output)
        changes, before = changes + (now != before), now
        if moment(time.monotonic() - started, changes):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(_LOOK_S)
    status = process.wait()
    return Course(status, time.monotonic() - started, changes, log.read_text(errors="replace"))


def _sizes(output: Path) -> dict[str, int]:
    """Every file's size, of the output and of what becomes it."""
    found: dict[str, int] = {}
    for top in (output, output.with_name(output.name + ".incomplete")):
        for directory, _, names in os.walk(top):
            for name in names:
                try:
                    found[f"{directory}/{name}"] = os.stat(f"{directory}/{name}").st_size
                except OSError:
                    continue  # gone since
    return found


def _left(task: Task, output: Path, found: Contents, whole: Contents) -> str:
    """In a word, what there is after a kill."""
    if found == whole:
        return "complete"
    files = _sizes(output)
    if not files:
        return "nothing"
    if any("incomplete" in name or "-tmp" in name for name in files):
        return "amid writing"
    return "results without the last" if any(name in found for name in task.results) else "between pieces"


def _wrong_end(course: Course) -> list[str]:
    return [] if course.status == 0 else [f"status {course.status}: {course.stderr.strip()[-300:]}"]


def _differing(found: Contents, whole: Contents) -> list[str]:
    return [name for name in {**whole, **found} if found.get(name) != whole.get(name)]


if __name__ == "__main__":
    sys.exit(main())
