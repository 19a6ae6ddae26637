"""Compiled programs of one loaded model: each is built once for its shapes and settings, and compilation is timed."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar, TypeVarTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moespec_jax.parallel.processes import put_global
from moespec_jax.status_line import showing

# XLA:CPU makes about three memory maps for every kernel of a program, and Linux limits the maps of a process.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

# XLA compiles, and loads compiled programs from a cache, without holding the lock of Python: the next is traced then.
_COMPILER = ThreadPoolExecutor(1, "compiler")

Settings = TypeVar("Settings")
Params = TypeVar("Params")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")
PyTree = TypeVar("PyTree")


class SideEffects(Exception):
    """A program calls back into Python, so that it must not be executed more often than requested."""


class _Program(NamedTuple):
    """A program that is being compiled, or is compiled.

    Fields:
        compiled: takes the parameters and the leaves of the other arguments.
        result: shapes of its result; None where they are not known.
        effects: whether it calls back into Python.
    """

    compiled: Future[Callable[..., object]]
    result: object = None
    effects: bool = False


class Programs:
    """Compiles functions of `(settings, params, *arguments)` for the arguments at hand, or finds them compiled.

    With a mesh, whose devices may belong to several processes, a program runs on every device at once, on its shard of
    every array. Where programs take half of the memory maps that the system allows, the least recently used are freed.

    Fields:
        mesh: devices to run on; None is JAX's default device.
        compile_s: seconds spent so far on tracing, and on waiting for programs to be compiled.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        self.compile_s = 0.0
        self._compiled: dict[Hashable, _Program] = {}
        self._executed: set[Hashable] = set()
        self._rehearsing = False

    @property
    def mesh_sizes(self) -> dict[str, int] | None:
        """Devices along each axis of the mesh, None for one device."""
        return None if self.mesh is None else dict(self.mesh.shape)

    def __repr__(self) -> str:
        return f"Programs({len(self)} compiled in {self.compile_s:.1f} s)"

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self,
        function: Callable[[Settings, Params, *Arguments], Result],
        settings: Settings,
        params: Params,
        *arguments: *Arguments,
        donate: bool = False,
        specs: Result | None = None,
    ) -> Result:
        """Call `function(settings, params, *arguments)`, compiled.

        All calls of one model share its parameters, so a program is identified by function, settings and the shapes of
        the other arguments; `specs` follows from them.

        Args:
            function: a pure function; `settings` is static.
            settings: a hashable value.
            params: parameters of the model.
            *arguments: pytrees of arrays.
            donate: reuse the memory of the first argument, a state.
            specs: sharding of the result on a mesh, with a `PartitionSpec` in place of every array.

        Raises:
            ValueError: there is a mesh, and no `specs`.
            SideEffects: the program has some, within `rehearsal`.
        """
        program = self._program(function, settings, params, arguments, donate, specs)
        if program.effects and self._rehearsing:
            raise SideEffects
        if not program.compiled.done():
            self._wait(program.compiled)
        # A compiled program has no type of its own.
        return cast(Result, program.compiled.result()(params, *jax.tree.leaves(arguments)))

    def prepare(
        self,
        function: Callable[[Settings, Params, *Arguments], Result],
        settings: Settings,
        params: Params,
        *arguments: *Arguments,
        donate: bool = False,
        specs: Result | None = None,
    ) -> Result:
        """Begin to compile what `run` would call, and return the shapes of its result at once. Arguments may be shapes
        too, on one device."""
        return cast(Result, self._program(function, settings, params, arguments, donate, specs).result)

    def hlo(
        self,
        function: Callable[[Settings, Params, *Arguments], Result],
        settings: Settings,
        params: Params,
        *arguments: *Arguments,
        donate: bool = False,
        specs: Result | None = None,
    ) -> str:
        """Optimised HLO of what `run` would call."""
        program = self._program(function, settings, params, arguments, donate, specs)
        return cast(jax.stages.Compiled, program.compiled.result()).as_text() or ""

    def _program(
        self,
        function: Callable[..., Result],
        settings: Hashable,
        params: object,
        arguments: tuple[object, ...],
        donate: bool,
        specs: Result | None,
    ) -> _Program:
        """Find a program, or trace it and begin to compile it."""
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, settings, donate, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        program = self._compiled.pop(key, None)
        if program is None or _failed(program.compiled):
            self._free_unused()
            with self._compiling():
                traced, lowered = self._lower(partial(function, settings), params, arguments, donate, specs)
            compiled = _COMPILER.submit(lowered.compile)
            program = _Program(compiled, traced.out_info, bool(traced.jaxpr.effects))
        self._compiled[key] = program  # the most recently used is last
        return program

    def _wait(self, compiled: Future[Callable[..., object]]) -> None:
        try:
            with self._compiling():
                wait([compiled])
        except KeyboardInterrupt:
            for program in self._compiled.values():  # the process would end after these only
                program.compiled.cancel()
            raise

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Show and count the seconds of the block as compilation."""
        started = time.perf_counter()
        with showing("compiling"):
            yield
        self.compile_s += time.perf_counter() - started

    def all_executed(self, keys: set[Hashable]) -> bool:
        """Test whether this was called before with every one of `keys`, since programs were last freed."""
        known = keys <= self._executed
        self._executed |= keys
        return known

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within the block programs run for the sake of their first execution, which is slower than later ones: the
        block ends at the first one with side effects, which is compiled only."""
        self._rehearsing = True
        try:
            with contextlib.suppress(SideEffects):
                yield
        finally:
            self._rehearsing = False

    def lower(
        self,
        function: Callable[[Params, *Arguments], Result],
        params: Params,
        *arguments: *Arguments,
        donate: bool = False,
        specs: Result | None = None,
    ) -> jax.stages.Lowered:
        """Lower `function(params, *arguments)`. The program takes the parameters and the leaves of the arguments, which
        may be shapes alone; with `donate`, those leaves of the first argument are donated that the result can reuse."""
        return self._lower(function, params, arguments, donate, specs)[1]

    def _lower(
        self,
        function: Callable[..., Result],
        params: object,
        arguments: tuple[object, ...],
        donate: bool,
        specs: Result | None,
    ) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
        leaves, tree = jax.tree.flatten(arguments)
        on_devices = self._on_every_device(function, params, arguments, specs)

        def flat(params: object, *leaves: jax.Array) -> Result:
            return on_devices(params, *tree.unflatten(leaves))

        # XLA multiplies float32 in fewer bits on accelerators by default.
        exact = jax.tree.leaves(params)[0].dtype == jnp.float32 and jax.default_backend() != "cpu"
        with jax.default_matmul_precision("highest" if exact else None):
            reused = _reusable(jax.tree.leaves(arguments[0]), jax.eval_shape(flat, params, *leaves)) if donate else []
            traced = jax.jit(flat, donate_argnums=tuple(1 + i for i in reused)).trace(params, *leaves)
            return traced, traced.lower()

    def put(self, array: np.ndarray, spec: PartitionSpec | None = None) -> jax.Array:
        """Place an argument of a program: replicated, or sharded by `spec`. Every process passes the whole of it."""
        if self.mesh is None:
            return jax.device_put(array)  # unlike jnp.asarray, without a program for each shape
        return put_global(array, NamedSharding(self.mesh, PartitionSpec() if spec is None else spec))

    def key(self, seed: int) -> jax.Array:
        """Random key of a seed, replicated."""
        key = jax.random.key(seed)
        return key if self.mesh is None else jax.random.wrap_key_data(self.put(np.asarray(jax.random.key_data(key))))

    def make(self, key: Hashable, function: Callable[[], PyTree], specs: PyTree | None) -> PyTree:
        """Call `function()`, on a mesh with its result sharded from the start; equal keys stand for equal functions."""
        if self.mesh is None:
            return function()
        if key not in self._compiled:
            jitted = _COMPILER.submit(jax.jit, function, out_shardings=_shardings(self.mesh, specs))
            self._compiled[key] = _Program(jitted)
        return cast(PyTree, self._compiled[key].compiled.result()())

    def _free_unused(self) -> None:
        while self._compiled and _crowded():
            del self._compiled[next(iter(self._compiled))]
            self._executed.clear()

    def _on_every_device(
        self, function: Callable[..., Result], params: object, arguments: tuple[object, ...], specs: Result | None
    ) -> Callable[..., Result]:
        if self.mesh is None:
            return function
        if specs is None:
            raise ValueError("expected a model on one device: this program has no sharding for a mesh")
        given = jax.tree.map(lambda leaf: leaf.sharding.spec, (params, *arguments))
        # Whether replicated results are equal on all devices is not checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=specs, check_vma=False)


def _failed(compiled: Future[Callable[..., object]]) -> bool:
    return compiled.cancelled() or (compiled.done() and compiled.exception() is not None)


def _reusable(given: Sequence[jax.Array | jax.ShapeDtypeStruct], result: object) -> list[int]:
    """Indices of arrays whose memory the result can take over: it has one of the same shape and dtype for each."""
    free = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(result))
    found = []
    for i, leaf in enumerate(given):
        if free[leaf.shape, leaf.dtype]:
            free[leaf.shape, leaf.dtype] -= 1
            found.append(i)
    return found


def _shardings(mesh: Mesh, specs: object) -> object:
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def _crowded() -> bool:
    """Test whether this process has more than half of the memory maps that it may have. Only Linux counts them."""
    try:
        with _MAPS.open("rb") as maps:
            return 2 * sum(1 for _ in maps) > int(_MOST_MAPS.read_text())
    except OSError:
        return False
