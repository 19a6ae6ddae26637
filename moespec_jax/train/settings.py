"""Settings of a training run, in its run.json: the same settings continue the run, and more steps extend it."""

import json
from pathlib import Path
from typing import Any

from moespec_jax.errors import RequestError
from moespec_jax.files import read_json


def settings_to_keep(directory: Path, run: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Compare settings with those of the run in `directory`, which is made if there is none.

    Args:
        directory: of the run.
        run: `recipe` and `source` as JSON.

    Returns:
        The content of run.json, and whether `directory` holds this run. Where the run is extended, the list `extended`
        has the former number of `steps`, and in `at` the checkpoint from which the learning rate follows the schedule
        of the new number.

    Raises:
        RequestError: it holds another run, or cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"expected a directory to train in at {directory}; {error.strerror}") from None
    file, saved = directory / "run.json", _last_checkpoint(directory)
    if not file.exists():
        if saved is not None:
            raise RequestError(f"expected run.json beside the checkpoints in {directory}: use another directory")
        return run, False
    before, run = read_json(file), json.loads(json.dumps(run))
    extended = before.pop("extended", [])
    steps, more = _steps(before), _steps(run)
    if 0 < steps < more:
        before["recipe"]["optimizer"]["steps"] = more
        extended = [*extended, {"steps": steps, "at": saved}] if saved else []
    if before != run:
        differ = _differences(before, run)
        raise RequestError(
            f"expected the settings that the run in {directory} began with; {', '.join(differ)} differ:"
            " continue with the same command or a larger --steps, or use another directory"
        )
    return run | ({"extended": extended} if extended else {}), True


def _steps(run: dict[str, Any]) -> int:
    """Number of all steps; 0 in a damaged file."""
    try:
        return int(run["recipe"]["optimizer"]["steps"])
    except (KeyError, TypeError, ValueError):
        return 0


def _last_checkpoint(directory: Path) -> int | None:
    """Step of the last complete checkpoint."""
    steps = [int(path.name) for path in (directory / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
    return max(steps, default=None)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """List the paths of values that differ, such as `recipe.optimizer.steps`."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = []
    for name in names:
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
