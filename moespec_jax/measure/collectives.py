"""Communication of a compiled program: its collectives, counted as often as loops run them."""

import dataclasses
import math
import re
from collections import Counter

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
# Iterations that the compilers for CPU and GPU note beside a loop.
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Condition of a loop over a known number of steps: its counter, which starts at 0, is below a constant.
_BELOW = re.compile(r"^\s+ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"^\s+%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "f32": 32, "s32": 32, "u32": 32, "s64": 64, "u64": 64}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one device.

    Fields:
        runs: number of executions of each kind.
        size: bytes of the results of each kind.
    """

    runs: Counter[str]
    size: Counter[str]

    def times(self, trips: int) -> "Traffic":
        """Scale to `trips` executions."""
        return Traffic(*(Counter({kind: n * trips for kind, n in part.items()}) for part in (self.runs, self.size)))

    def __add__(self, other: "Traffic") -> "Traffic":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Traffic(self.runs + other.runs, self.size + other.size)


def traffic(hlo: str) -> Traffic:
    """Count the collectives of one execution of an optimised program. A loop of unknown length counts as one iteration:
    the loop over rounds of speculative decoding is one."""
    bodies, entry = _computations(hlo)
    return _traffic_of(entry, bodies, {})


def _traffic_of(name: str, bodies: dict[str, list[str]], known: dict[str, Traffic]) -> Traffic:
    """Count the collectives of one execution of a computation; `known` holds those counted before."""
    if name not in known:
        found = Traffic(Counter(), Counter())
        for line in bodies.get(name, ()):
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            kind = instruction[2].removesuffix("-start")
            if kind in KINDS:
                found += Traffic(Counter({kind: 1}), Counter({kind: _bytes(instruction[1], instruction[2])}))
            condition = _CONDITION.search(line)
            trips = 1 if condition is None else _trips(line, bodies.get(condition[1], []))
            for called in _called(line):
                found += _traffic_of(called, bodies, known).times(trips)
        known[name] = found
    return known[name]


def _trips(loop: str, condition: list[str]) -> int:
    """Count the iterations of a loop with this condition; 1 if they are unknown."""
    if (known := _TRIPS.search(loop)) is not None:
        return int(known[1])
    constants = {found[1]: int(found[2]) for line in condition if (found := _CONSTANT.match(line))}
    below = [found[1] for line in condition if (found := _BELOW.match(line))]
    return constants.get(below[0], 1) if below else 1


def _called(line: str) -> list[str]:
    """List the computations that an instruction calls."""
    branches = _BRANCHES.search(line)
    names = [] if branches is None else [part.strip().lstrip("%") for part in branches[1].split(",")]
    return names + _CALLED.findall(line)


def _bytes(types: str, operation: str) -> int:
    """Count the bytes of the results of an operation."""
    arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(types) if dtype in _BITS]
    # The type of a `-start` operation lists operands and results; the results are last.
    if operation.endswith("-start") and len(arrays) > 1 and operation != "all-reduce-start":
        arrays = arrays[len(arrays) // 2 :]
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * _BITS[dtype] // 8 for dtype, dims in arrays)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Split a program into the lines of its computations; returns the name of the entry computation too."""
    bodies: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in hlo.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            current = start[1]
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry
