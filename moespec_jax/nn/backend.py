"""Back-ends: the expert compute, weight layout and layer loop of a platform, chosen once when a model is loaded."""

import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from moespec_jax.config import Activation
from moespec_jax.nn.attention import (
    LayerAttention,
    OutputProjection,
    WriteQkv,
    attend_layer,
    output_projection,
    write_qkv,
)
from moespec_jax.nn.cache import KeepRows, keep_rows
from moespec_jax.nn.experts.cpu import cpu_experts
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.nn.experts.forward_only import kernel, kernel_operands, loop
from moespec_jax.nn.experts.slots import slot_experts
from moespec_jax.nn.layers import AddNorm, add_norm
from moespec_jax.nn.moe import ExpertCompute
from moespec_jax.nn.routing import Route, Shortlist, route
from moespec_jax.nn.top_k import MostProbable, most_probable


class Backend(NamedTuple):
    """Choices that must fit each other.

    Fields:
        name: its key in `BACKENDS`.
        layout: weight layout of the routed experts (`experts/layouts.py`).
        stacked: whether layers are stacked and run under `lax.scan`.
        compute: builds the expert compute for an activation.
        supported: whether a GPU (a `jax.Device`) can run it.
        attention: attention over one layer of the cache.
        missing: names what kernels do not support of (activation, experts, dtype), None if they run; None without
            such kernels.
        platform: the only platform on which the kernels run, `slots` elsewhere; None where they run on all.
        write_qkv: projection to queries, and to keys and values in the cache.
        output_projection: projection of attention's output to the residual stream.
        add_norm: sum of the residual stream and a block's output, and its norm.
        route: choice of every token's experts.
        keep_rows: moves the accepted rows of the cache.
        most_probable: choice of drafted tokens.
        shortlist: routing under a budget that ranks experts by score alone; None: in plain operations.
        unrolled: whether the levels of a draft are unrolled: XLA:GPU copies every array that a loop carries.
    """

    name: str
    layout: Literal["per_expert", "flat"]
    stacked: bool
    compute: Callable[[Activation], ExpertCompute]
    supported: Callable[[Any], bool] = lambda device: True
    attention: LayerAttention = attend_layer
    missing: Callable[[Activation, Any, DTypeLike], str | None] | None = None
    platform: str | None = None
    write_qkv: WriteQkv = write_qkv
    output_projection: OutputProjection = output_projection
    add_norm: AddNorm = add_norm
    route: Route = route
    keep_rows: KeepRows = keep_rows
    most_probable: MostProbable = most_probable
    shortlist: Shortlist | None = None
    unrolled: bool = False


def _later(module: str, name: str) -> Callable[..., Any]:
    """Function of a module of `nn/` that is imported at the first call: Pallas takes long to import."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"moespec_jax.nn.{module}"), name)(*arguments)

    return call


def _pallas_attention(q: Array, k: Array, v: Array, layer: Array | None, mask: Array) -> Array:
    from moespec_jax.nn.attention_tpu import attend_layer_tpu

    q, k, v = kernel_operands("pallas", (q, k, v))
    return attend_layer_tpu(q, k, v, layer, mask)


_pallas_experts = _later("experts.pallas_tpu", "pallas_experts")


# Forms of a layer's parts in few launches, for NVIDIA GPUs: field of `Backend`, and function of a module of `nn/`.
GPU_FORMS = {
    "attention": ("attention_gpu", "attend_gpu"),
    "write_qkv": ("qkv_gpu", "write_qkv_gpu"),
    "output_projection": ("qkv_gpu", "output_projection_gpu"),
    "add_norm": ("norm_gpu", "add_norm_gpu"),
    "route": ("routing_gpu", "route_gpu"),
    "most_probable": ("top_k_gpu", "most_probable_gpu"),
    "shortlist": ("shortlist_gpu", "shortlist_gpu"),
    "keep_rows": ("cache_gpu", "keep_rows_gpu"),
}


def _gpu_form(backend: str, module: str, name: str) -> Callable[..., Any]:
    form = _later(module, name)
    return lambda *arguments: form(*kernel_operands(backend, arguments))


def _gpu_backend(name: str, kernels: str) -> Backend:
    """Back-end of the expert kernels in `nn/experts/{kernels}_gpu.py`. Layers are kept apart: XLA:GPU copies a slice of
    stacked weights before every product of several rows."""
    compute, supported, missing = (
        _later(f"experts.{kernels}_gpu", part) for part in (f"{kernels}_experts", "supported", "missing")
    )
    return Backend(
        name, "flat", False, kernel(name, compute), supported, missing=missing, platform="gpu", unrolled=True
    )


BACKENDS = {
    "switch": Backend("switch", "per_expert", False, loop("switch", cpu_experts)),
    "slots": Backend("slots", "flat", True, loop("slots", slot_experts)),
    "pallas": Backend(
        "pallas",
        "flat",
        True,
        kernel("pallas", _pallas_experts),
        attention=_pallas_attention,
        missing=_later("experts.pallas_tpu", "missing"),
    ),  # fmt: skip
    "triton": _gpu_backend("triton", "triton"),
    "mosaic": _gpu_backend("mosaic", "mosaic"),
    # The other parts of a layer are kernels too.
    "fused": _gpu_backend("fused", "triton")._replace(
        **{field: _gpu_form("fused", *form) for field, form in GPU_FORMS.items()}
    ),
    # Chosen by name only: with gradients, on every platform; it reads all experts.
    "dense": Backend("dense", "flat", False, dense_experts),
}
# Of plain operations alone.
PLAIN = BACKENDS["dense"]


def default_backend(device: Any = None) -> Backend:
    """Choose the back-end of a `jax.Device` (None is JAX's first).

    On CPU and NVIDIA GPUs of Ampere or later, the fastest that was measured (`docs/gpu.md`); on TPU the one with the
    least memory traffic by the compiler's count; `slots` elsewhere. What its kernels do not support, such as
    float32 on a GPU or MXFP4 experts on a TPU, runs as `slots` or in plain operations.
    """
    device = device or jax.devices()[0]
    preferred = BACKENDS[{"cpu": "switch", "gpu": "fused", "tpu": "pallas"}.get(device.platform, "slots")]
    return preferred if preferred.supported(device) else BACKENDS["slots"]


def expert_form(backend: Backend, activation: Activation, experts: object, dtype: DTypeLike, platform: str) -> str:
    """Name the expert compute that runs: the back-end's, or `slots` and why its kernels do not run."""
    if backend.missing is None:
        return backend.name
    elsewhere = backend.platform not in (None, platform)
    reason = platform if elsewhere else backend.missing(activation, experts, dtype)
    return backend.name if reason is None else f"slots ({backend.name} does not support {reason})"
