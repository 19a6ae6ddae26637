"""Back-ends: which expert compute, which weight layout and which layer loop suit a platform, chosen once at load."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array

from moespec_jax.nn.attention import LayerAttention, attend_layer
from moespec_jax.nn.experts.cpu import cpu_experts
from moespec_jax.nn.experts.slots import slot_experts
from moespec_jax.nn.moe import ExpertCompute


class Backend(NamedTuple):
    """A consistent choice of things that must fit each other.

    `layout` is that of `experts/layouts.py`; `stacked` says whether layers are stacked and scanned; `compute` builds
    the expert compute for an activation; `supported` says whether a GPU can run it;
    `attention` reads the cache of stacked layers.
    """

    name: str
    layout: Literal["per_expert", "flat"]
    stacked: bool
    compute: Callable[[str], ExpertCompute]
    supported: Callable[[Any], bool] = lambda device: True
    attention: LayerAttention = attend_layer


def _pallas_experts(activation: str) -> ExpertCompute:
    # Pallas takes its time to import, and only TPUs want it.
    from moespec_jax.nn.experts.pallas_tpu import pallas_experts

    return pallas_experts(activation)


def _pallas_attention(q: Array, k: Array, v: Array, layer: Array, mask: Array) -> Array:
    from moespec_jax.nn.attention_tpu import attend_layer_tpu

    return attend_layer_tpu(q, k, v, layer, mask)


def _mosaic_experts(activation: str) -> ExpertCompute:
    from moespec_jax.nn.experts.mosaic_gpu import mosaic_experts

    return mosaic_experts(activation)


def _mosaic_supported(device: Any) -> bool:
    from moespec_jax.nn.experts.mosaic_gpu import supported

    return supported(device)


def _triton_experts(activation: str) -> ExpertCompute:
    from moespec_jax.nn.experts.triton_gpu import triton_experts

    return triton_experts(activation)


def _triton_supported(device: Any) -> bool:
    from moespec_jax.nn.experts.triton_gpu import supported

    return supported(device)


BACKENDS = {
    "switch": Backend("switch", "per_expert", False, cpu_experts),
    "slots": Backend("slots", "flat", True, slot_experts),
    "pallas": Backend("pallas", "flat", True, _pallas_experts, attention=_pallas_attention),
    # Opt-in: compiled for these GPUs (Ampere to Hopper; Hopper alone), and never run on one.
    "triton": Backend("triton", "flat", True, _triton_experts, _triton_supported),
    "mosaic": Backend("mosaic", "flat", True, _mosaic_experts, _mosaic_supported),
}


def default_backend(platform: str | None = None) -> Backend:
    """The back-end preferred on a platform (`cpu`, `gpu`, `tpu`; None asks JAX).

    On CPU the one measured fastest; on TPU, so far, the one with the least memory traffic by the compiler's count.
    """
    preferred = {"cpu": "switch", "tpu": "pallas"}
    return BACKENDS[preferred.get(platform or jax.default_backend(), "slots")]
