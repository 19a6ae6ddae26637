"""Compiled programs of one loaded model, each built once per shape and setting, with the time that took kept apart."""

import time
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.parallel.processes import put_global

# XLA:CPU maps some three pieces of memory for every kernel of a program, and Linux lets a process have so many.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


class Programs:
    """Compiles functions of `(settings, params, ...)` for the arguments at hand, or finds them compiled. Where programs
    take half of the memory maps that the system allows, those that were not used for longest are let go.

    With a mesh, whose devices may be those of several processes, a program runs on each of its devices at once, and
    takes and gives its share of every array.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_s = 0.0

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self,
        function: Callable[..., Any],
        settings: Any,
        params: Any,
        *arguments: Any,
        donate: tuple[int, ...] = (),
        specs: Any = None,
    ) -> Any:
        """Call `function(settings, params, *arguments)`, compiled; `donate` counts from `params` as 0. `specs` say how
        the result lies on a mesh.

        All calls of one model share its parameters, so only the other arguments tell programs apart; where they lie,
        and `specs`, follow from function and settings.

        Raises:
            ValueError: there is a mesh, and no `specs`.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, settings, donate, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key in self._compiled:
            self._compiled[key] = self._compiled.pop(key)  # the last one used comes last
        else:
            self._make_room()
            started = time.perf_counter()
            lowered = self.lower(partial(function, settings), params, *arguments, donate=donate, specs=specs)
            self._compiled[key] = lowered.compile()
            self.compile_s += time.perf_counter() - started
        return self._compiled[key](params, *arguments)

    def lower(
        self,
        function: Callable[..., Any],
        params: Any,
        *arguments: Any,
        donate: tuple[int, ...] = (),
        specs: Any = None,
    ) -> jax.stages.Lowered:
        """The program of `function(params, *arguments)` before it is compiled; arguments may be shapes alone."""
        whole = self._on_every_device(function, (params, *arguments), specs)
        # Accelerators multiply float32 in fewer bits unless told otherwise; who asks for float32 means it.
        exact = jax.tree.leaves(params)[0].dtype == jnp.float32 and jax.default_backend() != "cpu"
        with jax.default_matmul_precision("highest" if exact else None):
            return jax.jit(whole, donate_argnums=donate).lower(params, *arguments)

    def put(self, array: np.ndarray, spec: PartitionSpec | None = None) -> jax.Array:
        """An argument of a program, whole on every device or as `spec` says: every process gives the whole of it."""
        if self.mesh is None:
            return jnp.asarray(array)
        return put_global(array, NamedSharding(self.mesh, PartitionSpec() if spec is None else spec))

    def key(self, seed: int) -> jax.Array:
        """The random key of a seed, on every device."""
        key = jax.random.key(seed)
        return key if self.mesh is None else jax.random.wrap_key_data(self.put(np.asarray(jax.random.key_data(key))))

    def make(self, key: Hashable, function: Callable[[], Any], specs: Any) -> Any:
        """What `function` gives, made where it is to lie; equal keys stand for equal functions."""
        if self.mesh is None:
            return function()
        if key not in self._compiled:
            self._compiled[key] = jax.jit(function, out_shardings=_shardings(self.mesh, specs))
        return self._compiled[key]()

    def _make_room(self) -> None:
        while self._compiled and _crowded():
            del self._compiled[next(iter(self._compiled))]

    def _on_every_device(self, function: Callable[..., Any], arguments: Any, specs: Any) -> Callable[..., Any]:
        if self.mesh is None:
            return function
        if specs is None:
            raise ValueError("expected a model on one device: this program has no place on a mesh")
        given = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
        # What a function gives on every device alike is not checked to be alike.
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=specs, check_vma=False)


def _shardings(mesh: Mesh, specs: Any) -> Any:
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def _crowded() -> bool:
    """Whether this process has more than half of the memory maps that it may have; no system but Linux counts them."""
    try:
        with _MAPS.open("rb") as maps:
            return 2 * sum(1 for _ in maps) > int(_MOST_MAPS.read_text())
    except OSError:
        return False
