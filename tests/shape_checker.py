"""The run-time checker of type and shape annotations in all tests (`conftest.py`): beartype, under jaxtyping's hook.

Trees of shardings, shapes or axis numbers have the classes of trees of arrays, and are not checked.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from beartype import beartype
from jax.sharding import PartitionSpec, Sharding

# Leaves that stand for arrays: shardings, shapes without memory, axis numbers of `vmap`, placeholders of JAX.
_PLACEHOLDERS = (PartitionSpec, Sharding, jax.ShapeDtypeStruct, jax.core.ShapedArray)


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of every call whose arguments are no placeholders."""
    checked = beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        stand_ins = any(isinstance(value, _PLACEHOLDERS) for value in (*args, *kwargs.values()))
        return (function if stand_ins else checked)(*args, **kwargs)

    return call
