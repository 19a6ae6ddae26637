"""Roofline of a verification: the bytes that it must read, over the copy bandwidth of the device."""

import time

import jax
import jax.numpy as jnp

from moespec_jax.config import DecoderConfig
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.nn.decoder import Decoder


def verification_bytes(config: DecoderConfig, target: Decoder, experts_read: float) -> float:
    """Compute the bytes that a device must read in a forward pass over a few tokens, on a mesh the mean of devices.

    They are the weights of `experts_read` experts of every sparse layer and all other weights, without an embedding
    that is not the output head: few of its rows are read.
    """
    embedding = 0 if target.lm_head is None else local_bytes(target.embed)
    others = local_bytes(target) - local_bytes(target.experts) - embedding
    return others + local_bytes(target.experts) * experts_read / max(config.num_experts, 1)


def copy_bandwidth(megabytes: int = 512, repeats: int = 10) -> float:
    """Measure the bytes per second, read and written, at which a large array is updated: the best of `repeats`.

    The update is in place: on CPUs, the first write to the pages of a new array takes ten times as long.
    """
    array = jnp.ones((megabytes << 18,), jnp.float32)
    add = jax.jit(lambda a: a + 1.0, donate_argnums=0)
    array, times = jax.block_until_ready(add(array)), []
    for _ in range(repeats):
        started = time.perf_counter()
        array = jax.block_until_ready(add(array))
        times.append(time.perf_counter() - started)
    return 2 * array.nbytes / min(times)
