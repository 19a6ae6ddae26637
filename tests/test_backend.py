"""The default back-end of a device."""

from types import SimpleNamespace

import jax
import pytest

from moespec_jax.nn.backend import default_backend


@pytest.mark.parametrize(
    ("platform", "compute_capability", "name"),
    [
        ("cpu", None, "switch"),
        ("tpu", None, "pallas"),
        ("gpu", "7.5", "slots"),
        ("gpu", "8.0", "triton"),
        ("gpu", "8.9", "triton"),
        ("gpu", "9.0", "triton"),
        ("gpu", "12.0", "triton"),
        ("gpu", "gfx942", "slots"),
        ("metal", None, "slots"),
    ],
)
def test_it_is_the_fastest_that_the_device_supports(platform: str, compute_capability: str | None, name: str) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=compute_capability)
    assert default_backend(device).name == name


def test_without_a_device_it_is_that_of_the_first() -> None:
    assert default_backend() == default_backend(jax.devices()[0])
