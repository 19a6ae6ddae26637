"""Compiled programs of one loaded model, each built once per shape and setting, with the time that took kept apart."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


class Programs:
    """Compiles functions of `(settings, params, ...)` for the arguments at hand, or finds them compiled."""

    def __init__(self) -> None:
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
    ) -> Any:
        """Call `function(settings, params, *arguments)`, compiled; `donate` counts from `params` as 0.

        All calls of one model share its parameters, so only the other arguments tell programs apart.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, settings, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            started = time.perf_counter()
            jitted = jax.jit(partial(function, settings), donate_argnums=donate)
            # Accelerators multiply float32 in fewer bits unless told otherwise; who asks for float32 means it.
            exact = jax.tree.leaves(params)[0].dtype == jnp.float32 and jax.default_backend() != "cpu"
            with jax.default_matmul_precision("highest" if exact else None):
                self._compiled[key] = jitted.lower(params, *arguments).compile()
            self.compile_s += time.perf_counter() - started
        return self._compiled[key](params, *arguments)
