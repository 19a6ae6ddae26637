"""A disk that is full, for this process, without a disk."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def full_disk(left: int = 0) -> Iterator[None]:
    """No file can grow beyond so many bytes, whether Python writes it or a library. What a full disk says differs in
    its number alone: EFBIG here, ENOSPC there. JAX, which only warns of a cache that it cannot write, writes none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
