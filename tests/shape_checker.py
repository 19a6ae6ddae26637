"""The run-time checker of type and shape annotations in all tests (`conftest.py`): beartype, under jaxtyping's hook.

JAX makes trees of shardings, shapes or placeholders with the classes of trees of arrays; those are not checked.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of every call in which nothing stands for an array."""
    checked = beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        placeholders = any(stands_for_array(value) for value in (*args, *kwargs.values()))
        return (function if placeholders else checked)(*args, **kwargs)

    return call


def stands_for_array(value: Any) -> bool:
    """True for objects of JAX that are no arrays (shardings, shapes), and for the plain objects that it flattens."""
    kind = type(value)
    return kind is object or (kind.__module__.split(".")[0] in ("jax", "jaxlib") and not isinstance(value, jax.Array))
