"""Values of a published `config.json`: looked up, checked for type and range, and refused by name.

A name is looked up in `places`, a sequence of mappings in order of precedence. Settings of a draft head may be at the
top level, in `eagle_config` (ModelOpt, SpecForge) or in `transformer_layer_config` (speculators); a flat config.json is
`[fields]`. A value of null counts as absent.
"""

import contextlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from moespec_jax.errors import CheckpointError, UnsupportedConfig

Fields = Mapping[str, Any]
Places = Sequence[Fields]
Default = TypeVar("Default")

# Bounds on sizes, so that no file causes an unbounded allocation. Numbers must be neither 0 nor infinite in float32.
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


@contextlib.contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Turn the errors of reading a draft head's config.json into one that names its place.

    Raises:
        CheckpointError: the block raised an error that a missing, wrong or mistyped field causes.
    """
    try:
        yield
    except UnsupportedConfig as error:
        raise CheckpointError(f"{error} ({where})") from None
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"config.json of a draft head has a field of the wrong type: {error} ({where})") from None


def shown(value: Any) -> str:
    """Format a value for an error message, truncated where it is long or deep."""
    return _SHOWN.repr(value)


def look_up(places: Places, name: str) -> Any:
    """Return the first value of a name; None where there is none."""
    return next((place[name] for place in places if place.get(name) is not None), None)


def require(places: Places, name: str) -> Any:
    """Return the first value of a name; None where all are null.

    Raises:
        KeyError: no place has the name.
    """
    if not any(name in place for place in places):
        raise KeyError(name)
    return look_up(places, name)


def section(fields: Fields, name: str) -> Fields:
    """Return a nested object, empty where it is absent.

    Raises:
        UnsupportedConfig: the value is not an object.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise UnsupportedConfig(f"expected {name} to be an object; config.json has {shown(value)}")
    return value or {}


def read_count(places: Places, name: str, default: Default, largest: int | None = None) -> int | Default:
    """Read an integer from 1 to `largest` (default: a bound for that name); `default` where it is absent.

    Raises:
        UnsupportedConfig: the value is of another type or out of range.
    """
    value = look_up(places, name)
    return default if value is None else as_count(name, value, largest)


def require_count(places: Places, name: str) -> int:
    """Read an integer from 1 to the bound for that name.

    Raises:
        KeyError: it is absent.
        UnsupportedConfig: the value is null, of another type or out of range.
    """
    return as_count(name, require(places, name))


def read_flag(places: Places, name: str, default: Default) -> bool | Default:
    """Read true or false; `default` where it is absent.

    Raises:
        UnsupportedConfig: the value is of another type.
    """
    value = look_up(places, name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedConfig(f"expected {name} to be true or false; config.json has {shown(value)}")
    return value


def read_number(places: Places, name: str, default: float) -> float:
    """Read a positive number that float32 can represent; `default` where it is absent.

    Raises:
        UnsupportedConfig: the value is of another type or out of range.
    """
    value = look_up(places, name)
    return as_number(name, default if value is None else value)


def as_count(name: str, value: Any, largest: int | None = None) -> int:
    """Check that a value is an integer from 1 to `largest` (default: a bound for that name).

    Raises:
        UnsupportedConfig: it is not.
    """
    bound = _LARGEST.get(name, LARGEST_COUNT) if largest is None else largest
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= bound:
        raise UnsupportedConfig(f"expected {name} to be an integer from 1 to {bound}; config.json has {shown(value)}")
    return value


def as_number(name: str, value: Any) -> float:
    """Check that a value is a positive number that float32 can represent.

    Raises:
        UnsupportedConfig: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _SMALLEST_NUMBER <= value <= _LARGEST_NUMBER:
        raise UnsupportedConfig(f"expected {name} to be a positive number; config.json has {shown(value)}")
    return float(value)
