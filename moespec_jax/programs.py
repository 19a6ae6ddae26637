"""Compiled programs of one loaded model, each built once per shape and setting, with the time that took kept apart."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from moespec_jax.decode import Settings


class Programs:
    """Compiles a function of `(settings, params, ...)` for the arguments at hand, or finds it compiled."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_s = 0.0

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self, function: Callable[..., Any], settings: Settings, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Call `function(settings, *arguments)`, compiled; `donate` numbers the arguments given away."""
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, settings, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            started = time.perf_counter()
            jitted = jax.jit(partial(function, settings), donate_argnums=donate)
            self._compiled[key] = jitted.lower(*arguments).compile()
            self.compile_s += time.perf_counter() - started
        return self._compiled[key](*arguments)
