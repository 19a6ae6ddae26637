"""A hostile environment for every test: shapes and types are checked at run time, ranks and dtypes are not promoted
silently, matrix products have full precision, and there is a CPU only."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
from devices import FAST_COMPILE_FLAGS

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), FAST_COMPILE_FLAGS])

import jax
import pytest
from jaxtyping import install_import_hook

# Before anything imports the package.
install_import_hook("moespec_jax", "shape_checker.check")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
# Tests compile many tiny programs; the second run of the suite finds them here. Every worker has its own cache, for
# one must not read what another has written half.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / f"xla-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the parameters of a test marked `slow_except(...)`, but those of these ids."""
    for item in items:
        marker = item.get_closest_marker("slow_except")
        if marker is not None and isinstance(item, pytest.Function) and item.callspec.id not in marker.args:
            item.add_marker("slow")


@pytest.fixture
def fast_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `jax.jit` of a test compiles quickly and runs slowly, whoever calls it; programs are kept in this cache."""
    from driver import FAST_COMPILE

    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))


@pytest.fixture
def keys() -> Iterator[jax.Array]:
    """An endless supply of independent random keys, the same in every run."""

    def supply() -> Iterator[jax.Array]:
        key = jax.random.key(0)
        while True:
            key, one = jax.random.split(key)
            yield one

    return supply()
