"""Bytes that the devices of a mesh exchange in a round, counted in the compiled program of the rounds."""

from typing import Any

import numpy as np

from moespec_jax.decoding.method import Method
from moespec_jax.measure.collectives import traffic
from moespec_jax.runtime.programs import Programs


def exchanged_bytes(programs: Programs, method: Method[Any, Any, Any], params: Any, state: Any) -> int | None:
    """Count the bytes of the results of all collectives of a round, on one device; None without a mesh.

    The program is the one that decodes, from a state such as `Run.state_after` makes.
    """
    if programs.mesh is None:
        return None
    rounds = programs.put(np.array(1, np.int32))
    specs = method.specs(params)
    hlo = programs.hlo(type(method).step, method, params, state, rounds, donate=True, specs=specs)
    return sum(traffic(hlo).size.values())
