"""Single values of a draft head's config.json: bounded, of the right type, and refused by name where they are not.

A head's settings may lie at the top level, in `eagle_config` (ModelOpt, SpecForge) or in `transformer_layer_config`
(speculators), so a reader here takes all places in order of precedence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moespec_jax.families import UnsupportedConfig

Fields = Mapping[str, Any]

_LARGEST_COUNT = 1 << 24


def look_up(places: Sequence[Fields], name: str) -> Any:
    """The first value of that name that is not null; None where there is none."""
    return next((place[name] for place in places if place.get(name) is not None), None)


def section(fields: Fields, name: str) -> Fields:
    """A nested object, empty where it is absent.

    Raises:
        UnsupportedConfig: it is something else.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise UnsupportedConfig(f"expected {name} to be an object; config.json says {value!r}")
    return value or {}


def read_count(places: Sequence[Fields], name: str, largest: int = _LARGEST_COUNT) -> int | None:
    """An integer from 1 to `largest`; None where there is none.

    Raises:
        UnsupportedConfig: it is something else: no size in somebody's file may make us allocate without bound.
    """
    value = look_up(places, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise UnsupportedConfig(f"expected {name} to be an integer from 1 to {largest}; config.json says {value!r}")
    return value


def read_flag(places: Sequence[Fields], name: str) -> bool | None:
    """True or false; None where there is neither.

    Raises:
        UnsupportedConfig: it is something else.
    """
    value = look_up(places, name)
    if value is not None and not isinstance(value, bool):
        raise UnsupportedConfig(f"expected {name} to be true or false; config.json says {value!r}")
    return value


def read_number(places: Sequence[Fields], name: str, default: float) -> float:
    """A positive finite number.

    Raises:
        UnsupportedConfig: it is something else.
    """
    value = look_up(places, name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise UnsupportedConfig(f"expected {name} to be a positive number; config.json says {value!r}")
    return float(value)
