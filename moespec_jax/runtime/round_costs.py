"""Costs of the rounds of a menu on this device, which decide the shape of every round (`decoding/choice.py`).

They are measured in the first rounds of the first run, all of which count: the text does not depend on the shapes. A
file beside the compiled programs keeps them for later runs of the same model, device, batch and menu.
"""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moespec_jax.decoding.menu import Menu, MenuState, with_costs
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json, write_json
from moespec_jax.parallel.processes import broadcast_from_first, is_first_process
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Advance, Run

# Each shape runs so many rounds at a time, so often in turn.
ROUNDS, TURNS = 4, 3
_FORMAT = "moespec_jax round costs 1"


@dataclasses.dataclass(frozen=True)
class RoundCosts:
    """What a round of each shape costs and gains; shape 0 is plain decoding.

    Fields:
        seconds: of a round.
        gains: tokens that a sequence gained in a round, on average.
        source: where they were measured: `this run`, or the file that holds them.
    """

    seconds: tuple[float, ...]
    gains: tuple[float, ...]
    source: str


class Chooser:
    """Costs of one run's menu: kept ones, or measured in its first rounds."""

    def __init__(
        self, menu: Menu[Any, Any], run: Run[Any, Any, Any], programs: Programs, identity: dict[str, Any],
        known: dict[str, RoundCosts],
    ) -> None:  # fmt: skip
        self._menu, self._run, self._programs, self._identity, self._known = menu, run, programs, identity, known
        self._costs: RoundCosts | None = None

    def prepare(self, advance: Advance[MenuState], state: MenuState) -> MenuState:
        """Begin to choose: by kept costs or else, after a few rounds of every shape, by measured ones."""
        digest, count = _digest(self._identity), len(self._menu.names)
        kept = self._known.get(digest) or kept_costs(self._identity)
        if broadcast_from_first(int(kept is not None)):
            kept = kept or RoundCosts((0.0,) * count, (0.0,) * count, "the first process")
            self._costs = _agreed(kept.seconds, kept.gains, kept.source)
        else:
            state = self._measure(advance, state)
        if self._costs is None:  # the sequences ended before
            return state
        self._known[digest] = self._costs
        return self._with_costs(state, self._costs.seconds, self._costs.gains)

    def report(self) -> dict[str, Any]:
        """The field `choice` of a result."""
        names, costs = self._menu.names, self._costs
        report: dict[str, Any] = {"rounds": dict(zip(names, self._run.rounds_of, strict=True))}
        if costs is None:
            return report | {"round_s": None, "gains": None, "source": "not measured: the text was too short"}
        by_name = {"round_s": costs.seconds, "gains": costs.gains}
        return report | {k: dict(zip(names, v, strict=True)) for k, v in by_name.items()} | {"source": costs.source}

    def _measure(self, advance: Advance[MenuState], state: MenuState) -> MenuState:
        """Run every shape in turn."""
        shapes = len(self._menu.names)
        seconds: list[list[float]] = [[] for _ in range(shapes)]
        gains: list[list[float]] = [[] for _ in range(shapes)]
        for _ in range(TURNS):
            for shape in range(shapes):
                if self._run.is_done(state):
                    return state
                forced = np.where(np.arange(shapes) == shape, 1.0, np.inf).tolist()
                state = self._with_costs(state, forced, [1.0] * shapes)
                state, part = advance(state, shape, ROUNDS)
                seconds[shape].append(part.seconds / part.rounds)
                gains[shape].append(part.gained)
        means = [1.0, *map(statistics.fmean, gains[1:])]
        self._costs = _agreed(tuple(map(statistics.median, seconds)), tuple(means), "this run")
        if is_first_process():
            keep_costs(self._identity, self._menu.names, self._costs)
        return state

    def _with_costs(self, state: MenuState, seconds: Sequence[float], gains: Sequence[float]) -> MenuState:
        arrays = (self._programs.put(np.asarray(values, np.float32)) for values in (seconds, gains))
        return with_costs(state, *arrays)


def kept_costs(identity: dict[str, Any]) -> RoundCosts | None:
    """Read the costs of this model, device, batch and menu; None where there are none, or no directory of programs."""
    file = _file(identity)
    if file is None or not file.exists():
        return None
    try:
        fields = read_json(file)
        if fields["format"] != _FORMAT or fields["identity"] != identity:
            return None
        return RoundCosts(tuple(fields["seconds"]), tuple(fields["gains"]), str(file))
    except (CheckpointError, KeyError, TypeError):
        return None


def keep_costs(identity: dict[str, Any], names: tuple[str, ...], costs: RoundCosts) -> None:
    """Write the costs for later runs, if there is a directory of programs. Where that fails, they measure again."""
    file = _file(identity)
    if file is None:
        return
    fields = {"format": _FORMAT, "identity": identity, "shapes": names}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, fields | {"seconds": costs.seconds, "gains": costs.gains})
    except OSError:
        return


def _agreed(seconds: Sequence[float], gains: Sequence[float], source: str) -> RoundCosts:
    """Costs of the first process, on which all decide: in whole nanoseconds, gains in millionths of a token."""

    def of_first(values: Sequence[float], unit: float) -> tuple[float, ...]:
        return tuple(broadcast_from_first(min(round(value * unit), 2**31 - 1)) / unit for value in values)

    return RoundCosts(of_first(seconds, 1e9), of_first(gains, 1e6), source)


def _file(identity: dict[str, Any]) -> Path | None:
    directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not directory or "://" in directory:
        return None
    return Path(directory) / "round_costs" / f"{_digest(identity)}.json"


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
