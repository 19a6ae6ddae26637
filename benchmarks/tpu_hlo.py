"""What an optimized HLO program, as the TPU compiler prints it, puts into HBM besides its arguments.

Large values are results of `LARGE` bytes or more in HBM, in loops or outside, except updates in place. Those of the
size of a weight, an expert or a layer's cache are taken for copies of one; the rest are activations, which prefill has
and one-token decoding must not have.

The compiler's cost analysis counts the bytes of all memories alike; `near_bytes` says how many of them are in VMEM.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from moespec_jax.config import DecoderConfig
from moespec_jax.measure.local_bytes import local_size

LARGE = 4_000_000

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_NAME = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
# These name a value that is already there, or (start) one that its `done` names again.
_VIEWS = re.compile(r"parameter|get-tuple-element|tuple|while|conditional|bitcast|constant|opt-barrier|.*-start")
_SLICES = ("slice", "dynamic-slice", "gather", "dynamic-update-slice")


def copyable_sizes(config: DecoderConfig, tree: Any) -> set[tuple[str, int]]:
    """Types and element counts by which `large_values` finds copies of weights and caches: those of the tree's leaves
    on one device, whole, of one layer, and of one expert."""
    parts = [1, max(config.num_hidden_layers, 1), max(config.num_sparse_layers * config.num_experts, 1)]
    return {("bf16", local_size(leaf) // part) for leaf in jax.tree.leaves(tree) for part in parts}


def large_values(hlo: str, weights: set[tuple[str, int]]) -> tuple[list[str], list[str]]:
    """Copies of weights or cache, and activations, as `operation dtype[dims]`, the largest first.

    `weights` holds what a copy is recognized by: dtype and number of elements of every weight, expert and cache array.
    """
    bodies = computations(hlo)
    fused = {name for lines in bodies.values() for line in lines for name in _fusion_body(line)}
    lines = [line for name, body in bodies.items() if name not in fused for line in body]
    found = [value for line in lines for value in _materialised(line, bodies)]
    copies, activations = [], []
    for op, dtype, dims in sorted(found, key=lambda value: -_width(value[1]) * _count(value[2])):
        (copies if (dtype, _count(dims)) in weights else activations).append(f"{op} {dtype}[{dims}]")
    return copies, activations


def near_bytes(hlo: str) -> int:
    """Bytes that instructions write to VMEM and read from it, every instruction taken once, as in the cost analysis.

    Rather too few: without padding, without kernels (which are counted by their own estimate), without the transfers
    that end in VMEM, and without values that are read in part.
    """
    bodies = computations(hlo)
    fused = {name for lines in bodies.values() for line in lines for name in _fusion_body(line)}
    return sum(_near(body, bodies) for name, body in bodies.items() if name not in fused)


def _near(body: list[str], bodies: dict[str, list[str]]) -> int:
    types = {_name(line): found[1] for line in body if (found := _INSTRUCTION.match(line))}
    total = 0
    for line in body:
        found = _INSTRUCTION.match(line)
        if found is None or _VIEWS.fullmatch(found[2]) or found[2] == "custom-call" or found[2].endswith("-done"):
            continue
        updated = _updated_in_place(found[2], line, bodies)
        total += sum(size for count, size in _in_vmem(found[1]) if count not in updated)
        in_part = _read_in_part(found[2], line, bodies)
        whole = [types.get(name, "") for i, name in enumerate(_operands(line)) if i not in in_part]
        total += sum(size for one in whole if not one.startswith("(") for _, size in _in_vmem(one))
    return total


def _in_vmem(types: str) -> list[tuple[int, int]]:
    """Elements and bytes of the arrays in VMEM."""
    return [(_count(d), _count(d) * _width(dtype)) for dtype, d, layout in _ARRAY.findall(types) if "S(1)" in layout]


def _read_in_part(op: str, line: str, bodies: dict[str, list[str]]) -> set[int]:
    """Which operands an instruction takes a slice of: itself, or what it fuses."""
    if op in _SLICES:
        return {0}
    found = set()
    for body in (bodies[name] for name in _fusion_body(line)):
        for one in body:
            if (number := re.search(r" parameter\((\d+)\)", one)) and _sliced(_name(one), body, bodies):
                found.add(int(number[1]))
    return found


def _sliced(name: str, body: list[str], bodies: dict[str, list[str]]) -> bool:
    """Whether anything in a fused computation takes a slice of a value."""
    for line in body:
        found = _INSTRUCTION.match(line)
        if found is None or name not in (operands := _operands(line)):
            continue
        if found[2] == "bitcast" and _sliced(_name(line), body, bodies):
            return True
        if any(operands[i] == name for i in _read_in_part(found[2], line, bodies)):
            return True
    return False


def _name(line: str) -> str:
    found = _NAME.match(line)
    return found[1] if found else ""


def _operands(line: str) -> list[str]:
    """Names between the parentheses after the operation."""
    found = _INSTRUCTION.match(line)
    rest, depth = line[found.end() :] if found else "", 1
    for i, character in enumerate(rest):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", rest[:i])
    return []


def _materialised(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """Operation, dtype and dimensions of every large array that this instruction writes to HBM as a whole."""
    found = _INSTRUCTION.match(line)
    if found is None or _VIEWS.fullmatch(found[2]):
        return
    updated = _updated_in_place(found[2], line, bodies)
    for dtype, dims, layout in _ARRAY.findall(found[1]):
        # A layout that names a memory space names VMEM (or a semaphore's); HBM is the default.
        if _count(dims) * _width(dtype) >= LARGE and "S(" not in layout and _count(dims) not in updated:
            yield found[2], dtype, dims


def computations(hlo: str) -> dict[str, list[str]]:
    """Lines of every computation, by its name."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            lines = bodies.setdefault(header[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _fusion_body(line: str) -> list[str]:
    return re.findall(r" fusion\(.*calls=%?([\w.\-]+)", line)


def _updated_in_place(op: str, line: str, bodies: dict[str, list[str]]) -> set[int]:
    """Element counts of arrays that this instruction writes a part of: itself, or what it fuses."""
    lines = [line] if op == "dynamic-update-slice" else [one for name in _fusion_body(line) for one in bodies[name]]
    found = [_INSTRUCTION.match(one) for one in lines]
    shapes = [_ARRAY.findall(one[1])[0] for one in found if one is not None and one[2] == "dynamic-update-slice"]
    return {_count(dims) for _, dims, _ in shapes}


def _count(dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size)


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
