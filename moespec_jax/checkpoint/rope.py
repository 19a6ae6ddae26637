"""Rotary settings of a published `config.json`, in every spelling: `rope_parameters` (transformers 5), or
`rope_scaling` beside `rope_theta`; each is one object, or one for each type of layer.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moespec_jax.checkpoint.config_fields import (
    Fields,
    Places,
    as_count,
    as_number,
    read_flag,
    read_number,
    section,
    shown,
)
from moespec_jax.config import RopeConfig
from moespec_jax.errors import UnsupportedConfig

# Parameters that other programs write, with the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "finetuned": (True, False),
    "apply_yarn_scaling": (True,),
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}
_READ_APART = {
    *("rope_type", "rope_theta", "partial_rotary_factor", "interleaved"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
}


def read_rope(fields: Fields, default_theta: float, partial: float | None = None) -> RopeConfig:
    """Read the rotary settings of a config.json. Where it states them more than once, all statements must agree.

    `partial` is the share of each head that a family rotates where the file does not state it; None for families that
    always rotate whole heads.

    Raises:
        UnsupportedConfig: statements contradict each other; or a scaling other than default, linear, dynamic, yarn or
            llama3, an unknown parameter, or partial rotary heads.
    """
    stated = [(name, _read(given, fields, default_theta, partial)) for name, given in _statements(fields)]
    if not stated:
        return _read({}, fields, default_theta, partial)
    first, rope = stated[0]
    for name, other in stated[1:]:
        for field in dataclasses.fields(RopeConfig):
            ours, theirs = getattr(rope, field.name), getattr(other, field.name)
            if ours != theirs:
                raise UnsupportedConfig(
                    f"expected {first} and {name} to agree, or one of them; config.json has {field.name} {ours!r} by"
                    f" the first and {theirs!r} by the second"
                )
    return rope


def rope_of_layers(fields: Fields, kind: str) -> Fields:
    """Return the fields with the rotary settings of one type of layer in place of those of all types."""
    own = dict(fields)
    for name in ("rope_parameters", "rope_scaling"):
        given = section(fields, name)
        if any(isinstance(value, dict) for value in given.values()):
            own[name] = given.get(kind)
    return own


def _statements(fields: Fields) -> Iterator[tuple[str, Fields]]:
    """Yield each object with rotary settings, with its name."""
    for name in ("rope_parameters", "rope_scaling"):
        given = section(fields, name)
        if not any(isinstance(value, dict) for value in given.values()):
            if given:
                yield name, given
            continue
        for kind in given:  # types of layers
            if not isinstance(given[kind], dict):
                raise UnsupportedConfig(f"expected {name}.{kind} to be an object; config.json has {shown(given[kind])}")
            yield f"{name}.{kind}", given[kind]


def _read(given: Fields, fields: Fields, default_theta: float, partial: float | None) -> RopeConfig:
    """Read one object; `fields` is the whole config.json, whose top level may hold further settings."""
    given = dict(given)
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = as_number("rope_theta", given.pop("rope_theta", None) or fields.get("rope_theta") or default_theta)
    if rope_type not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise UnsupportedConfig(
            f"expected rope_type default, linear, dynamic, yarn or llama3; config.json has {shown(rope_type)}"
        )
    share = _partial_factor((given, fields), partial)
    given.pop("partial_rotary_factor", None)
    given = {name: value for name, value in given.items() if value is not None}
    if rope_type == "default":
        given = {}
    if rope_type in ("yarn", "llama3") and (original := fields.get("original_max_position_embeddings")) is not None:
        given["original_max_position_embeddings"] = original  # has precedence, as in transformers
    rope = RopeConfig(rope_type=rope_type, rope_theta=theta, partial_rotary_factor=share, **_scaling(given, rope_type))
    if rope_type == "yarn" and theta == 1.0:
        raise UnsupportedConfig("expected rope_theta other than 1 for rope_type 'yarn'")
    if rope.low_freq_factor > rope.high_freq_factor:
        low, high = rope.low_freq_factor, rope.high_freq_factor
        raise UnsupportedConfig(f"expected low_freq_factor of at most high_freq_factor; config.json has {low}, {high}")
    return rope


def _partial_factor(places: Places, partial: float | None) -> float:
    """Read the share of each head that is rotated."""
    share = read_number(places, "partial_rotary_factor", 1.0 if partial is None else partial)
    if share > 1 or (partial is None and share != 1):
        expected = "of at most 1" if partial is not None else "1"
        raise UnsupportedConfig(f"expected partial_rotary_factor {expected}; config.json has {shown(share)}")
    return share


def _scaling(given: Fields, rope_type: str) -> dict[str, Any]:
    """Check the parameters of a rotary scaling. `truncate` is a flag, all others are numbers."""
    given = {name: value for name, value in given.items() if value not in _NEUTRAL.get(name, ())}
    known = {f for f in RopeConfig.__dataclass_fields__ if f not in _READ_APART}
    if unknown := set(given) - known:
        name = min(unknown)
        raise UnsupportedConfig(
            f"unknown rope parameter {shown(name)} for rope_type {rope_type!r}; config.json has {shown(given[name])}"
        )
    if rope_type != "default" and "factor" not in given:
        raise UnsupportedConfig(f"rope_type {rope_type!r} needs the parameter 'factor'")
    read: dict[str, Any] = {}
    for name, value in given.items():
        if name == "truncate":
            read[name] = read_flag([given], name, False)
        elif name == "original_max_position_embeddings":
            # Some tools write whole numbers as 4096.0.
            read[name] = as_count(name, int(value) if isinstance(value, float) and value.is_integer() else value)
        else:  # published files have an mscale of 0
            read[name] = 0.0 if name.startswith("mscale") and value == 0 else as_number(name, value)
    return read
