"""Ahead-of-time compilation for TPUs on a machine without them, and the compiler's statistics of a program.

Importing this module configures JAX: programs are compiled for described chips, and run on none.
"""

import importlib.metadata
import os
import re
import time
from typing import Any, NamedTuple

# Without these, libtpu would query a metadata server for the chips of this machine, and take a lock.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

# JAX ignores the environment variable if it was imported before this module.
jax.config.update("jax_platforms", "cpu")

SLOTS, DTYPE = 2048, jnp.bfloat16
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


class Program(NamedTuple):
    """Compiled program, with the compiler's statistics in bytes of one device.

    Fields:
        bytes_accessed: bytes read and written.
        argument_bytes: size of the arguments.
        temp_bytes: size of the temporaries.
        alias_bytes: size of the donated arguments that hold results.
        compile_s: seconds of compilation.
        hlo: optimised HLO.
    """

    bytes_accessed: int
    argument_bytes: int
    temp_bytes: int
    alias_bytes: int
    compile_s: float
    hlo: str


class OutOfMemory(Exception):
    """The program needs more than the chip's `available` bytes."""

    def __init__(self, available: int) -> None:
        super().__init__(f"the chip has {available} bytes")
        self.available = available


def devices(chip: str, topology: str | None = None) -> list[Any]:
    """List the devices of a topology, by default that of `TOPOLOGIES` for the chip."""
    name = TOPOLOGIES[chip] if topology is None else topology
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def compile_lowered(lowered: jax.stages.Lowered) -> Program:
    """Compile for the devices of the arguments' shardings.

    Raises:
        OutOfMemory: the program does not fit the chip.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        limit = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error))
        if limit is None:
            raise
        raise OutOfMemory(int(float(limit[1]) * 2**30)) from None
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and cost is not None
    return Program(
        bytes_accessed=int(cost["bytes accessed"]),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        compile_s=seconds,
        hlo=compiled.as_text() or "",
    )


def versions() -> dict[str, str]:
    """Versions of JAX and of the compiler."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
