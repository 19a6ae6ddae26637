"""Single values of somebody's `config.json`: bounded, of the right type, and refused by name where they are not."""

import reprlib
from collections.abc import Mapping
from typing import Any

from moespec_jax.errors import UnsupportedConfig

Fields = Mapping[str, Any]

# No size in a file may make us allocate without bound, and numbers must be neither 0 nor infinite as float32.
LARGEST_COUNT = 1 << 24
_LARGEST = {
    "num_hidden_layers": 1 << 11,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "original_max_position_embeddings": 1 << 30,
}
_SMALLEST_NUMBER, _LARGEST_NUMBER = 1e-37, 1e37
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxlong, _SHOWN.maxother = 4, 80, 40, 80


def shown(value: Any) -> str:
    """A value in an error message, cut where it is long or deep."""
    return _SHOWN.repr(value)


def read_count(fields: Fields, name: str) -> int:
    """A size: an integer from 1 to what is still sane of that name.

    Raises:
        KeyError: it is missing.
        UnsupportedConfig: it is something else.
    """
    return as_count(name, fields[name], _LARGEST.get(name, LARGEST_COUNT))


def as_count(name: str, value: Any, largest: int = LARGEST_COUNT) -> int:
    """The value as an integer from 1 to `largest`.

    Raises:
        UnsupportedConfig: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise UnsupportedConfig(
            f"expected {name} to be an integer from 1 to {largest}; config.json says {shown(value)}"
        )
    return value


def read_flag(fields: Fields, name: str, default: bool = False) -> bool:
    """True or false; the default where the value is missing or null.

    Raises:
        UnsupportedConfig: it is something else.
    """
    value = as_flag(name, fields.get(name))
    return default if value is None else value


def as_flag(name: str, value: Any) -> bool | None:
    """The value as true, false or neither.

    Raises:
        UnsupportedConfig: it is something else.
    """
    if value is not None and not isinstance(value, bool):
        raise UnsupportedConfig(f"expected {name} to be true or false; config.json says {shown(value)}")
    return value


def as_number(name: str, value: Any) -> float:
    """The value as a positive number that float32 can hold.

    Raises:
        UnsupportedConfig: it is something else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _SMALLEST_NUMBER <= value <= _LARGEST_NUMBER:
        raise UnsupportedConfig(f"expected {name} to be a positive number; config.json says {shown(value)}")
    return float(value)
