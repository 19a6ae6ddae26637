"""Costs of the rounds of a menu on this device, which decide the shape of every round (`decoding/choice.py`).

They are measured in the first runs, in rounds that count: the text does not depend on the shapes. A file beside the
compiled programs keeps them for later runs of the same model, device, batch and menu. A table in their place, that of a
profile, decides as it is (`profile_costs.py`).
"""

import contextlib
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.decoding.menu import Menu, MenuState
from moespec_jax.decoding.round_info import RoundInfo, RoundShape
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json, write_json
from moespec_jax.parallel.processes import broadcast_from_first, is_first_process
from moespec_jax.runtime.programs import Programs
from moespec_jax.runtime.run import Advance, OnRound, Run

# Rounds of one measurement, of plain decoding and of a tree, and measurements of each shape.
PLAIN_ROUNDS, TREE_ROUNDS, TURNS = 24, 8, 3
_FORMAT = "moespec_jax round costs 1"
# Settings of a measurement that make it another one, and how a result names them.
_DIFFERENCES = {
    "config": "model", "precision": "precision", "backend": "back-end", "batch": "batch", "mesh": "mesh",
    "device": "device", "cores": "number of cores",
}  # fmt: skip


@dataclasses.dataclass
class RoundCosts:
    """Costs and gains of rounds of each shape; shape 0 is plain decoding.

    Fields:
        seconds: of a round, for each shape and measurement.
        tokens: that a sequence gained in a round, likewise.
        source: where they were measured: `this run`, or the file that holds them.
        needed: measurements of each shape to decide by.
    """

    seconds: list[list[float]]
    tokens: list[list[float]]
    source: str = "this run"
    needed: int = TURNS

    @property
    def complete(self) -> bool:
        """Test whether every shape was measured often enough."""
        return min(map(len, self.seconds)) >= self.needed

    @property
    def best(self) -> int:
        """Shape that gains most tokens a second."""
        return int(np.argmax(np.divide(self.gains, self.round_s)))

    @property
    def round_s(self) -> list[float]:
        """Seconds of a round of each shape: the least that was measured, since other work only adds to it."""
        return [min(of_shape) for of_shape in self.seconds]

    @property
    def gains(self) -> list[float]:
        """Tokens that a sequence gained in a round of each shape, on average; in plain decoding it is one."""
        return [1.0, *map(statistics.fmean, self.tokens[1:])]


class Chooser:
    """Costs of one run's menu: kept ones, or measured in its first rounds.

    Fields:
        decides: whether rounds are chosen by the costs, and no longer to measure them.
    """

    def __init__(
        self, menu: Menu[Any, Any], params: Any, run: Run[Any, Any, Any], programs: Programs, identity: dict[str, Any],
        known: dict[str, RoundCosts],
    ) -> None:  # fmt: skip
        self._menu, self._params, self._run, self._programs, self._identity = menu, params, run, programs, identity
        shapes = range(len(menu.names))
        costs = known_costs(identity, known) or RoundCosts([[] for _ in shapes], [[] for _ in shapes])
        self._costs = known[_digest(identity)] = costs
        self.decides, self._reported = False, [0 for _ in shapes]

    @property
    def first_parts(self) -> Sequence[int] | None:
        """Shapes that rounds begin with; None, all of them, where costs are measured first."""
        complete = self._costs.complete
        best = broadcast_from_first(self._costs.best if complete else 0)
        return [best] if broadcast_from_first(int(complete)) else None

    def prepare(self, advance: Advance[MenuState], state: MenuState) -> MenuState:
        """Begin to choose: by kept costs or else, after measurements of every shape, by measured ones."""
        if not broadcast_from_first(int(self._costs.complete)):
            state = self._measure(advance, state)
        if not broadcast_from_first(int(self._costs.complete)):  # the sequences ended before
            return state
        unknown = [1.0] * len(self._menu.names)  # in a process without the first one's file
        seconds, gains = (self._costs.round_s, self._costs.gains) if self._costs.complete else (unknown, unknown)
        self.decides = self._costs.complete
        return self._with_costs(state, _of_first(seconds, 1e9), _of_first(gains, 1e6))

    def report(self) -> dict[str, Any]:
        """The field `choice` of a result."""
        names, costs = self._menu.names, self._costs
        report: dict[str, Any] = {"rounds": dict(zip(names, self._run.rounds_of, strict=True))}
        if not costs.complete:
            missing = "not yet measured: the texts were too short"
            return report | {"round_s": None, "gains": None, "predicted_s": None, "source": missing}
        by_name = {"round_s": costs.round_s, "gains": costs.gains}
        report |= {k: dict(zip(names, v, strict=True)) for k, v in by_name.items()}
        predicted = float(np.dot(self._run.rounds_of, costs.round_s))
        return report | {"predicted_s": predicted, "source": costs.source}

    def shape_of_round(self, info: RoundInfo) -> RoundShape:
        """Shape of the round that was run last, with the predictions by which it was chosen, of which there are none
        while costs are measured. To be called after every round."""
        counts = self._run.rounds_of
        ran = next(i for i, (now, before) in enumerate(zip(counts, self._reported, strict=True)) if now > before)
        self._reported = list(counts)
        tree = self._menu.names[ran] if ran else None
        if not self.decides or info.expected is None:
            return RoundShape(tree)
        return RoundShape(tree, self._costs.round_s[ran], float(info.expected))

    def _measure(self, advance: Advance[MenuState], state: MenuState) -> MenuState:
        """Run the shape that was measured least, until all are measured or every sequence is done."""
        costs, shapes = self._costs, len(self._menu.names)
        counts = [broadcast_from_first(len(of_shape)) for of_shape in costs.seconds]
        order = [shape for turn in range(TURNS) for shape in range(shapes) if counts[shape] <= turn]
        for shape in order:
            forced = np.where(np.arange(shapes) == shape, 1.0, np.inf).tolist()
            rounds = TREE_ROUNDS if shape else PLAIN_ROUNDS
            state, part = advance(self._with_costs(state, forced, [1.0] * shapes), shape, rounds)
            if self._run.is_done(state):
                break
            costs.seconds[shape].append(part.seconds / part.rounds)
            costs.tokens[shape].append(part.gained)
        if is_first_process():
            keep_costs(self._identity, self._menu.names, costs)
        return state

    def _with_costs(self, state: MenuState, seconds: Sequence[float], gains: Sequence[float]) -> MenuState:
        costs, gained = (self._programs.put(np.asarray(values, np.float32)) for values in (seconds, gains))
        specs = None if self._programs.mesh is None else self._menu.specs(self._params)[0]
        return self._programs.run(Menu.price, self._menu, self._params, state, costs, gained, donate=True, specs=specs)


def with_shapes(on_round: OnRound | None, tree: object, chooser: Chooser | None) -> OnRound | None:
    """Report the rounds of a tree, or of what a chooser chose, with their shapes."""
    if on_round is None:
        return None

    def report(number: int, info: RoundInfo) -> None:
        shape = RoundShape(tree.name if isinstance(tree, TreeConfig) else None)
        on_round(number, info._replace(shape=shape if chooser is None else chooser.shape_of_round(info)))

    return report


def known_by(tree: object, identity: dict[str, Any], known: dict[str, RoundCosts]) -> dict[str, RoundCosts]:
    """Known costs of a run whose tree is "auto"; or those of a table in place of it, whose source then names the
    settings that it was measured with and that differ."""
    if not isinstance(tree, CostTable):
        return known
    other = [word for name, word in _DIFFERENCES.items() if tree.identity.get(name) != identity[name]]
    source = tree.source + (f" (measured with another {', '.join(other)})" if other else "")
    seconds, tokens = ([list(of_shape) for of_shape in part] for part in (tree.seconds, tree.tokens))
    return {_digest(identity): RoundCosts(seconds, tokens, source, needed=1)}


def are_known(identity: dict[str, Any], known: dict[str, RoundCosts]) -> bool:
    """Test whether all costs of this model, device, batch and menu were measured before."""
    costs = known_costs(identity, known)
    return bool(broadcast_from_first(int(costs is not None and costs.complete)))


def known_costs(identity: dict[str, Any], known: dict[str, RoundCosts]) -> RoundCosts | None:
    """Look up the costs of this model, device, batch and menu: among the known ones, else in their file."""
    return known.get(_digest(identity)) or kept_costs(identity)


def kept_costs(identity: dict[str, Any]) -> RoundCosts | None:
    """Read the costs of this model, device, batch and menu; None where there are none, or no directory of programs."""
    file = _file(identity)
    if file is None or not file.exists():
        return None
    try:
        fields = read_json(file)
        if fields["format"] != _FORMAT or fields["identity"] != identity:
            return None
        costs = RoundCosts(fields["seconds"], fields["tokens"], str(file))
        numbers = [float(number) for part in (costs.seconds, costs.tokens) for of_shape in part for number in of_shape]
        return costs if len(costs.seconds) == len(costs.tokens) and min(numbers, default=1.0) > 0 else None
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None


def keep_costs(identity: dict[str, Any], names: tuple[str, ...], costs: RoundCosts) -> None:
    """Write the costs for later runs, if there is a directory of programs. Where that fails, they measure again."""
    file = _file(identity)
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, cost_fields(identity, names, costs))


def cost_fields(identity: dict[str, Any], names: Sequence[str], costs: RoundCosts) -> dict[str, Any]:
    """Fields of costs in files."""
    fields = {"format": _FORMAT, "identity": identity, "shapes": list(names)}
    return fields | {"seconds": costs.seconds, "tokens": costs.tokens}


def _of_first(values: Sequence[float], unit: float) -> list[float]:
    """Broadcast the first process's numbers, by which all decide, in whole units."""
    return [broadcast_from_first(min(round(value * unit), 2**31 - 1)) / unit for value in values]


def _file(identity: dict[str, Any]) -> Path | None:
    directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not directory or "://" in directory:
        return None
    return Path(directory) / "round_costs" / f"{_digest(identity)}.json"


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
