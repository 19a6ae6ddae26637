"""Back-ends: which expert compute, which weight layout and which layer loop suit a platform, chosen once at load."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from moespec_jax.experts.cpu import cpu_experts
from moespec_jax.experts.slots import slot_experts
from moespec_jax.moe import ExpertCompute


class Backend(NamedTuple):
    """A consistent choice of three things that must fit each other.

    `layout` is that of `experts/layouts.py`; `stacked` says whether layers are stacked and scanned; `compute` builds
    the expert compute for an activation.
    """

    name: str
    layout: Literal["per_expert", "flat"]
    stacked: bool
    compute: Callable[[str], ExpertCompute]


def _pallas_experts(activation: str) -> ExpertCompute:
    # Pallas takes its time to import, and only TPUs want it.
    from moespec_jax.experts.pallas_tpu import pallas_experts

    return pallas_experts(activation)


def _mosaic_experts(activation: str) -> ExpertCompute:
    from moespec_jax.experts.mosaic_gpu import mosaic_experts

    return mosaic_experts(activation)


BACKENDS = {
    "switch": Backend("switch", "per_expert", False, cpu_experts),
    "slots": Backend("slots", "flat", True, slot_experts),
    "pallas": Backend("pallas", "flat", True, _pallas_experts),
    # Opt-in: it lowers for Hopper GPUs, and was never run on one.
    "mosaic": Backend("mosaic", "flat", True, _mosaic_experts),
}


def default_backend(platform: str | None = None) -> Backend:
    """The back-end preferred on a platform (`cpu`, `gpu`, `tpu`; None asks JAX).

    On CPU the one measured fastest; on TPU, so far, the one with the least memory traffic by the compiler's count.
    """
    preferred = {"cpu": "switch", "tpu": "pallas"}
    return BACKENDS[preferred.get(platform or jax.default_backend(), "slots")]
