"""Settings of a conversation that can change between turns: `/set NAME VALUE`."""

from typing import Any

from moespec_jax.cli.sampling_flags import SAMPLING_FLAGS
from moespec_jax.errors import RequestError

# Type and meaning of each name: the flags of `generate`.
SETTINGS: dict[str, tuple[type, str]] = {flag[2:]: (kind, meaning) for flag, kind, _, meaning in SAMPLING_FLAGS} | {
    "max-new-tokens": (int, "largest number of tokens of an answer"),
    "seed": (int, "seed of random draws"),
}


def set_value(values: dict[str, Any], words: list[str]) -> str:
    """Change a setting by the words after `/set`; returns the line to print.

    Raises:
        RequestError: there is no such setting, or the value is none of its type.
    """
    if not words:
        return "\n".join(f"{name} {_value(values, name)}: {meaning}" for name, (_, meaning) in SETTINGS.items())
    name, *rest = words
    if name not in SETTINGS or len(rest) != 1:
        raise RequestError(f"expected /set NAME VALUE, with a name among {', '.join(SETTINGS)}; got {' '.join(words)}")
    kind, _ = SETTINGS[name]
    try:
        values[name.replace("-", "_")] = kind(rest[0])
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise RequestError(f"expected {expected} for {name}; got {rest[0]!r}") from None
    return f"{name} {_value(values, name)}"


def _value(values: dict[str, Any], name: str) -> str:
    value = values.get(name.replace("-", "_"))
    return "as generation_config.json" if value is None else str(value)
