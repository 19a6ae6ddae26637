"""Which states of the target a draft head taps, as boundaries: boundary b is the residual stream entering layer b.

Files say it in two conventions that differ by one, or not at all. A head read with the wrong one still runs, and its
text is still right: only acceptance collapses. Hence an origin goes with every answer, to be shown to whoever loads.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from moespec_jax.checkpoint.config_fields import Fields, shown
from moespec_jax.checkpoint.head.fields import section
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import UnsupportedConfig

Format = Literal["eagle", "specforge", "speculators"]
# A published id is either a boundary (vLLM) or the layer whose output is tapped (SpecForge, ModelOpt).
Convention = Literal["boundary", "layer output"]

IDS = "eagle_aux_hidden_state_layer_ids"


class Boundaries(NamedTuple):
    """Boundaries from low to high, and where they come from, in words."""

    values: tuple[int, ...]
    origin: str


class Override(NamedTuple):
    """What is known of a repository and contradicts its files: the boundaries, or the convention of its ids."""

    boundaries: tuple[int, ...] | None = None
    convention: Convention | None = None


OVERRIDES: dict[str, Override] = {
    # Trained on the embedding and the outputs of layers 11 and 22; its file does not say so.
    "granite-3.1-1b-a400m-eagle3": Override(boundaries=(0, 12, 23)),
    # Its ids end at the number of layers, so they cannot be outputs of layers.
    "gpt-oss-120b-eagle3-v3": Override(convention="boundary"),
}


def resolve_boundaries(
    fields: Fields,
    head_format: Format,
    target: DecoderConfig,
    name: str = "",
    explicit: Sequence[int] | None = None,
) -> Boundaries:
    """The tapped boundaries of a head: those asked for, else a known exception, else its ids, else the formula.

    `name` is what the head was asked for by, a hub id or a directory; `fields` is its config.json.

    Raises:
        UnsupportedConfig: the boundaries are not strictly increasing within the target, or the ids are no integers.
    """
    if explicit is not None:
        return _checked(Boundaries(_integers(explicit, "the boundaries asked for"), "as asked for"), target)
    known = _override(name)
    if known.boundaries is not None:
        return _checked(Boundaries(known.boundaries, f"known of {name}, whatever its file says"), target)
    ids, convention, place = _named_ids(fields, head_format)
    if ids:
        convention = known.convention or convention
        shift = 1 if convention == "layer output" else 0
        origin = f"{place} {_listed(ids)}, {_MEANING[convention]}"
        return _checked(Boundaries(tuple(i + shift for i in ids), origin), target)
    return _checked(_formula(head_format, target), target)


_MEANING = {
    "boundary": "each the boundary before a layer",
    "layer output": "each the output of a layer",
}


def _named_ids(fields: Fields, head_format: Format) -> tuple[tuple[int, ...], Convention, str]:
    """The ids of a config.json, which may be none, with their convention and the name of their place."""
    nested = section(fields, "eagle_config").get(IDS)
    if nested and head_format != "speculators":
        return _integers(nested, f"eagle_config.{IDS}"), "layer output", f"eagle_config.{IDS}"
    # At the top level only vLLM reads them, and it reads boundaries.
    return _integers(fields.get(IDS) or (), IDS), "boundary", IDS


def _formula(head_format: Format, target: DecoderConfig) -> Boundaries:
    """What training code taps where nothing is said. The public OLMoE head was trained by a fork of EAGLE's code that
    takes the input of the last layer in place of the third from the end."""
    layers = target.num_hidden_layers
    last = 1 if head_format == "eagle" and target.model_type == "olmoe" else 3
    values = (2, layers // 2, layers - last)
    return Boundaries(values, f"the file names none: 2, L/2, L-{last} for {target.model_type} with L = {layers}")


def _override(name: str) -> Override:
    parts = re.split(r"[/\\]|--", name.lower())
    return next((OVERRIDES[part] for part in parts if part in OVERRIDES), Override())


def _checked(found: Boundaries, target: DecoderConfig) -> Boundaries:
    values, layers = found.values, target.num_hidden_layers
    increasing = all(low < high for low, high in zip(values, values[1:], strict=False))
    if not values or not increasing or values[0] < 0 or values[-1] > layers:
        raise UnsupportedConfig(
            f"expected strictly increasing boundaries from 0 to {layers}, as {target.model_type} has; came"
            f" {_listed(values)} ({found.origin}): name them explicitly"
        )
    return found


def _integers(values: Any, place: str) -> tuple[int, ...]:
    right = isinstance(values, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not right:
        raise UnsupportedConfig(f"expected {place} to be a list of integers; came {shown(values)}")
    return tuple(values)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
