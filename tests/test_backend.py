"""The default back-end of a device, and the form of expert compute that runs."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flat_experts import FFN, random_experts

from moespec_jax.config import Activation, ClampedSwiglu
from moespec_jax.nn.backend import BACKENDS, default_backend, expert_form
from moespec_jax.nn.quantization import Quantized


@pytest.mark.parametrize(
    ("platform", "compute_capability", "name"),
    [
        ("cpu", None, "switch"),
        ("tpu", None, "pallas"),
        ("gpu", "7.5", "slots"),
        ("gpu", "8.0", "fused"),
        ("gpu", "8.9", "fused"),
        ("gpu", "9.0", "fused"),
        ("gpu", "12.0", "fused"),
        ("gpu", "gfx942", "slots"),
        ("metal", None, "slots"),
    ],
)
def test_it_is_the_fastest_that_the_device_supports(platform: str, compute_capability: str | None, name: str) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=compute_capability)
    assert default_backend(device).name == name


def test_without_a_device_it_is_that_of_the_first() -> None:
    assert default_backend() == default_backend(jax.devices()[0])


@pytest.mark.parametrize(
    ("change", "dtype", "activation", "platform", "form"),
    [
        ({}, "bfloat16", "silu", "gpu", "triton"),
        ({}, "bfloat16", "silu", "cpu", "slots (triton does not support cpu)"),
        ({}, "float32", "silu", "gpu", "slots (triton does not support experts in float32)"),
        ({"ffn": 96}, "bfloat16", "silu", "gpu", "slots (triton does not support experts of 128 x 96)"),
        ({}, "bfloat16", "gelu", "gpu", "slots (triton does not support the activation gelu)"),
        ({"quantized": True}, "bfloat16", "silu", "gpu", "triton"),
        ({"quantized": True}, "float32", "silu", "gpu", "slots (triton does not support tokens in float32)"),
        ({}, "bfloat16", ClampedSwiglu(), "gpu", "triton"),
    ],
)
def test_what_kernels_do_not_support_is_named(
    change: dict[str, Any], dtype: str, activation: Activation, platform: str, form: str
) -> None:
    experts = random_experts(jnp.dtype(dtype), ffn=change.get("ffn", FFN))
    if "quantized" in change:
        experts = jax.tree.map(lambda w: Quantized(w.astype(jnp.int8), jnp.ones((len(w), 1, w.shape[2]))), experts)
    assert expert_form(BACKENDS["triton"], activation, experts, dtype, platform) == form
    assert expert_form(BACKENDS["slots"], activation, experts, dtype, platform) == "slots"


def test_mosaic_names_what_triton_supports() -> None:
    experts = random_experts()
    quantized = jax.tree.map(lambda w: Quantized(w.astype(jnp.int8), jnp.ones((len(w), 1, w.shape[2]))), experts)
    biased = experts.replace(gate_bias=jnp.zeros((len(experts.gate), 1, FFN), jnp.bfloat16))
    cases = [
        (quantized, "silu", "quantized experts"), (biased, "silu", "experts with biases"),
        (experts, ClampedSwiglu(), "the activation clamped SwiGLU"),
    ]  # fmt: skip
    for unlike, activation, reason in cases:
        assert expert_form(BACKENDS["mosaic"], activation, unlike, "bfloat16", "gpu") == (
            f"slots (mosaic does not support {reason})"
        )
        assert expert_form(BACKENDS["triton"], activation, unlike, "bfloat16", "gpu") == "triton"
