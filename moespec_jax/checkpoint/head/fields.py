"""Single values of a draft head's config.json: bounded, of the right type, and refused by name where they are not.

A head's settings may lie at the top level, in `eagle_config` (ModelOpt, SpecForge) or in `transformer_layer_config`
(speculators), so a reader here takes all places in order of precedence.
"""

from collections.abc import Sequence
from typing import Any

from moespec_jax.checkpoint.config_fields import LARGEST_COUNT, Fields, as_count, as_flag, as_number, shown
from moespec_jax.errors import UnsupportedConfig


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
        raise UnsupportedConfig(f"expected {name} to be an object; config.json says {shown(value)}")
    return value or {}


def read_count(places: Sequence[Fields], name: str, largest: int = LARGEST_COUNT) -> int | None:
    """An integer from 1 to `largest`; None where there is none.

    Raises:
        UnsupportedConfig: it is something else: no size in somebody's file may make us allocate without bound.
    """
    value = look_up(places, name)
    return None if value is None else as_count(name, value, largest)


def read_flag(places: Sequence[Fields], name: str) -> bool | None:
    """True or false; None where there is neither.

    Raises:
        UnsupportedConfig: it is something else.
    """
    return as_flag(name, look_up(places, name))


def read_number(places: Sequence[Fields], name: str, default: float) -> float:
    """A positive number that float32 can hold.

    Raises:
        UnsupportedConfig: it is something else.
    """
    value = look_up(places, name)
    return as_number(name, default if value is None else value)
