"""Every family on every mesh of eight devices, and in two and four processes, beside one device:

    python -m benchmarks.meshes --out benchmarks/results

decodes three prompts of unlike length as one batch, 24 tokens each, with tiny random models in float32
(tests/spread.py): plainly, with a tree of 20 tokens, by sampling, and with a budget of 4 of 8 experts, global and
balanced. `same` says that tokens, rounds, acceptance by depth and the counts of experts are those of one device.
`experts_slowest` is what the busiest device read per layer and pass, of what was read in all. Devices are virtual ones
of a CPU: no times.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from devices import results  # pyright: ignore[reportMissingImports]
from spread import FAMILIES, WAYS  # pyright: ignore[reportMissingImports]

from moespec_jax.parallel.mesh import parse_mesh
from moespec_jax.runtime.results import versions

MESHES = ("data=8", "expert=8", "tensor=8", "data=2,expert=2,tensor=2")
# What several processes decode.
SHARED = ("tree", "global")
COMPARED = ("tokens", "accepted", "rounds", "experts_wanted", "experts_read")


def main() -> None:
    """Run all and write `meshes.json`."""
    parser = argparse.ArgumentParser(description="Every family on every mesh, beside one device.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    rows = []
    for family in options.families:
        for processes, meshes, ways in ((1, MESHES, WAYS), (2, MESHES[-1:], SHARED), (4, MESHES[-1:], SHARED)):
            command = ["tests/spread.py", family, "--mesh", *meshes, "--ways", *ways]
            found = results(command, devices=8 // processes, processes=processes)
            assert all(one == found[0] for one in found)
            new = [row for mesh in meshes for row in compared(family, processes, mesh, ways, found[0])]
            print(json.dumps(new), file=sys.stderr, flush=True)
            rows += new
    report = {"versions": versions(), "dtype": "float32", "rows": rows}
    text = json.dumps(report, indent=1) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        (options.out / "meshes.json").write_text(text)
    if not all(row["same"] for row in rows):
        sys.exit("expected all to be the same; some are not")


def compared(
    family: str, processes: int, mesh: str, ways: Sequence[str], found: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each method."""
    rows = []
    for way in ways:
        here = with_experts_read(found[mesh][way])
        one = with_experts_read(found[f"one/{way}{parse_mesh(mesh).expert if way == 'balanced' else ''}"])
        row = {"family": family, "processes": processes, "mesh": mesh, "way": way}
        row["same"] = all(here[name] == one[name] for name in COMPARED)
        rows.append(row | {"experts_read": here["experts_read"], "experts_slowest": here["experts_max_per_device"]})
    return rows


def with_experts_read(run: dict[str, Any]) -> dict[str, Any]:
    """Complete a run by `experts_read`, which only budgets measure: without one, every selected expert is read."""
    return {"experts_read": run["experts_wanted"]} | run


if __name__ == "__main__":
    main()
