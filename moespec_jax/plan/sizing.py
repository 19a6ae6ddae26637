"""Rows of the sizing table: memory and communication of a model on a slice of TPU chips, counted by the compiler."""

from typing import Any, NamedTuple

from jax.sharding import Mesh

from moespec_jax.measure.collectives import traffic
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.quantization import Quantization
from moespec_jax.parallel.mesh import make_mesh
from moespec_jax.plan.ahead import OutOfMemory, compile_lowered, devices
from moespec_jax.plan.program import Load, Round, abstract_round, lower_round, mesh_for, workload


class Slice(NamedTuple):
    """Slice of TPU chips. Slices are named as on Google Cloud, which counts two cores for each v5p device.

    Fields:
        topology: name of the compiler's topology.
        devices: number of its devices.
    """

    topology: str
    devices: int


SLICES = {
    "v5e-1": Slice("v5e:2x2", 1), "v5e-4": Slice("v5e:2x2", 4), "v5e-8": Slice("v5e:2x4", 8),
    "v5e-16": Slice("v5e:4x4", 16), "v5e-32": Slice("v5e:4x8", 32),
    "v6e-1": Slice("v6e:2x2", 1), "v6e-4": Slice("v6e:2x2", 4), "v6e-8": Slice("v6e:2x4", 8),
    "v6e-16": Slice("v6e:4x4", 16), "v6e-32": Slice("v6e:4x8", 32),
    "v5p-2": Slice("v5p:2x2x1", 1), "v5p-8": Slice("v5p:2x2x1", 4), "v5p-16": Slice("v5p:2x2x2", 8),
    "v5p-32": Slice("v5p:2x2x4", 16),
}  # fmt: skip
# Bytes of a device's memory that a program can use.
HBM = {"v5e": 15.75 * 2**30, "v6e": 31.25 * 2**30, "v5p": 95 * 2**30}


def size_up(load: Load, name: str, quantization: Quantization | None) -> dict[str, Any]:
    """Compute a row of the table. Sizes are bytes of one device; collectives are, for each kind, the number of
    executions in a round and the bytes of their results.

    Raises:
        ValueError: the model cannot be sharded over the slice.
    """
    topology, count = SLICES[name]
    chip = name.partition("-")[0]
    mesh = mesh_for(load, count)
    placed = make_mesh(mesh, devices(chip, topology)[:count])
    round_ = abstract_round(workload(load, placed, BACKENDS["pallas"], quantization))
    decoding, draft_cache = round_.state.decoding, round_.state.draft.cache
    row = {
        "slice": name,
        "devices": mesh.devices,
        "mesh": str(mesh),
        "experts": quantization or "bfloat16",
        "weights": local_bytes(round_.params),
        "cache": local_bytes((decoding.cache.k, decoding.cache.v, draft_cache.k, draft_cache.v)),
        "available": int(HBM[chip]),
    }
    # Compiled only where weights and caches fit.
    fits = row["weights"] + row["cache"] < row["available"]
    return row | (_compiled(round_, placed) if fits else {"fits": False})


def _compiled(round_: Round, mesh: Mesh) -> dict[str, Any]:
    """Compile a round; returns the columns that the compiler determines."""
    try:
        program = compile_lowered(lower_round(round_, mesh))
    except OutOfMemory:
        return {"fits": False}
    found = traffic(program.hlo)
    return {
        "fits": True,
        "memory": program.argument_bytes + program.temp_bytes,
        "temporaries": program.temp_bytes,
        "collectives": {kind: [found.runs[kind], found.size[kind]] for kind in sorted(found.runs)},
        "compile_s": round(program.compile_s, 1),
    }
