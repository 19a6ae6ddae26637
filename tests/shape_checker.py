"""The run-time checker of type and shape annotations in all tests (`conftest.py`): beartype, under jaxtyping's hook.

JAX makes trees of shardings, shapes, placeholders or numbers with the classes of trees of arrays (`jax.tree.map`);
those are not checked.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from beartype import BeartypeConf, beartype

# PEP 484: an int is accepted where a float is expected.
with_numeric_tower = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of every call in which no object takes the place of an array."""
    checked = with_numeric_tower(function)
    makes_object = function.__name__ == "__init__"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        unchecked = any(stands_for_array(value) for value in values) or (makes_object and is_mapped_tree(*values))
        return (function if unchecked else checked)(*args, **kwargs)

    return call


def stands_for_array(value: Any) -> bool:
    """True for objects of JAX and optax that are no arrays (shardings, shapes, masks), and for plain objects."""
    kind = type(value)
    library = kind.__module__.split(".")[0] in ("jax", "jaxlib", "optax")
    return kind is object or (library and not isinstance(value, jax.Array))


def is_mapped_tree(instance: Any, *fields: Any) -> bool:
    """True for an object of a pytree's class without any array of JAX that has an axis: a host copy, or numbers."""
    arrays = any(isinstance(field, jax.Array) and field.ndim for field in fields)
    return getattr(type(instance), "_flax_dataclass", False) and not arrays
