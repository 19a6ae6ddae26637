"""Boundaries of a draft head: the hidden states of the target that it reads. Boundary b is the residual stream entering
layer b.

Published files state them in two conventions that differ by one, or not at all. Under the wrong one a head still runs
and the output is still exact, but acceptance collapses. Every result therefore includes its origin, to be shown to the
user.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from moespec_jax.checkpoint.config_fields import Fields, Places, look_up, section, shown
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import UnsupportedConfig

Format = Literal["eagle", "specforge", "speculators"]
# A published id is either a boundary (vLLM) or the layer whose output the head reads (SpecForge, ModelOpt).
Convention = Literal["boundary", "layer output"]

IDS, TAPS = "eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids"


class Boundaries(NamedTuple):
    """Boundaries of one head.

    Fields:
        values: boundaries, increasing.
        origin: description of their source.
    """

    values: tuple[int, ...]
    origin: str


class Override(NamedTuple):
    """Correction of one repository's files.

    Fields:
        boundaries: its boundaries; None where the ids of its files are used.
        convention: convention of its ids; None where it is the usual one.
    """

    boundaries: tuple[int, ...] | None = None
    convention: Convention | None = None


OVERRIDES: dict[str, Override] = {
    # Trained on the embedding and the outputs of layers 11 and 22, which its config.json does not state.
    "granite-3.1-1b-a400m-eagle3": Override(boundaries=(0, 12, 23)),
    # Its last id is the number of layers, so the ids cannot be outputs of layers.
    "gpt-oss-120b-eagle3-v3": Override(convention="boundary"),
}


def resolve_boundaries(
    fields: Fields,
    head_format: Format,
    target: DecoderConfig,
    name: str = "",
    explicit: Sequence[int] | None = None,
) -> Boundaries:
    """Determine the boundaries of a head: those requested, else a known correction, else its ids, else the formula.

    Args:
        fields: the head's config.json.
        head_format: its format.
        target: settings of the target.
        name: hub id or directory of the head, to find corrections.
        explicit: requested boundaries.

    Raises:
        UnsupportedConfig: the boundaries are not strictly increasing within the target, or the ids are not integers.
    """
    if explicit is not None:
        return _checked(Boundaries(_integers(explicit, "the requested boundaries"), "as requested"), target)
    override = _override(name)
    if override.boundaries is not None:
        return _checked(Boundaries(override.boundaries, f"known for {name}, in place of its config.json"), target)
    ids, convention, place = _stated_ids(fields, head_format)
    formula = _formula(head_format, target)
    if not ids:
        return _checked(formula, target)
    ambiguous = convention == "layer output" and ids[0] != 1
    if ambiguous and ids == formula.values:
        convention = "boundary"
    convention = override.convention or convention
    shift = 1 if convention == "layer output" else 0
    values = tuple(i + shift for i in ids)
    doubt = _DOUBT if ambiguous and override.convention is None else _contradiction(fields, place, values)
    return _checked(Boundaries(values, f"{place} {_listed(ids)}, {_MEANING[convention]}{doubt}"), target)


def resolve_taps(
    places: Places,
    speculators: bool,
    target: DecoderConfig,
    layers: int,
    name: str = "",
    explicit: Sequence[int] | None = None,
) -> Boundaries:
    """Determine the boundaries of a DFlash head: those requested, else a known correction, else its ids, else z-lab's
    formula for a head of so many `layers`.

    Args:
        places: config.json and its sections that hold the head's settings.
        speculators: whether the files are of speculators, whose ids are boundaries; others' are outputs of layers.
        target: settings of the target.
        layers: number of the head's layers.
        name: hub id or directory of the head, to find corrections.
        explicit: requested boundaries.

    Raises:
        UnsupportedConfig: the boundaries are not strictly increasing within the target, the ids are not integers, or
            files of speculators have none.
    """
    if explicit is not None:
        return _checked(Boundaries(_integers(explicit, "the requested boundaries"), "as requested"), target)
    override, place = _override(name), TAPS if speculators else "target_layer_ids"
    if override.boundaries is not None:
        return _checked(Boundaries(override.boundaries, f"known for {name}, in place of its config.json"), target)
    ids, formula = _integers(look_up(places, place) or (), place), even_taps(target.num_hidden_layers, layers)
    if not ids and speculators:
        raise UnsupportedConfig(f"config.json of a draft head lacks the field {TAPS!r}")
    if not ids:
        stated = f"config.json states none: outputs of layers 1 to L-3, with L = {target.num_hidden_layers}"
        return _checked(Boundaries(tuple(i + 1 for i in formula), stated), target)
    convention = override.convention or ("boundary" if speculators else "layer output")
    values = tuple(i + (convention == "layer output") for i in ids)
    doubt = _DOUBTED_TAPS if speculators and ids == formula and override.convention is None else ""
    if not speculators and values[-1] == target.num_hidden_layers:
        doubt = "; the last is read before the target's last norm, and z-lab's code reads it after"
    return _checked(Boundaries(values, f"{place} {_listed(ids)}, {_MEANING[convention]}{doubt}"), target)


def even_taps(target_layers: int, taps: int) -> tuple[int, ...]:
    """Layers whose outputs z-lab's code reads by default, evenly from 1 to L - 3."""
    if taps == 1:
        return (target_layers // 2,)
    return tuple(round(1 + i * (target_layers - 4) / (taps - 1)) for i in range(taps))


_MEANING = {
    "boundary": "each the boundary before a layer",
    "layer output": "each the output of a layer",
}


# SGLang reads ids that begin with 1 as outputs of layers and others as boundaries (pull request 25454), older versions
# all as outputs. Ids that are the default boundaries are read as such; other ids keep the format's meaning.
_DOUBT = "; ambiguous, since engines differ in ids that do not begin with 1: check with python -m convert.probe_draft"

# Files of speculators whose ids are those that z-lab's code means as outputs of layers: which of the two they are does
# not follow from the file.
_DOUBTED_TAPS = (
    "; ambiguous, since z-lab's default outputs of layers have these ids: check with python -m convert.probe_draft"
)


def _stated_ids(fields: Fields, head_format: Format) -> tuple[tuple[int, ...], Convention, str]:
    """Read the ids of a config.json (possibly none), with their convention and the name of their field."""
    nested = section(fields, "eagle_config").get(IDS)
    if nested and head_format != "speculators":
        return _integers(nested, f"eagle_config.{IDS}"), "layer output", f"eagle_config.{IDS}"
    # Ids at the top level are read by vLLM only, as boundaries.
    return _integers(fields.get(IDS) or (), IDS), "boundary", IDS


def _contradiction(fields: Fields, place: str, values: tuple[int, ...]) -> str:
    """Describe ids at the top level that name other boundaries than those that are used; empty where there are none."""
    top = fields.get(IDS)
    if place == IDS or not top or _integers(top, IDS) == values:
        return ""
    return f"; ambiguous, since {IDS} names {_listed(top)}: check with python -m convert.probe_draft"


def _formula(head_format: Format, target: DecoderConfig) -> Boundaries:
    """Return the boundaries that training code uses by default. The public OLMoE head was trained by a fork of EAGLE's
    code that uses the input of the last layer instead of the third from the end."""
    layers = target.num_hidden_layers
    last = 1 if head_format == "eagle" and target.model_type == "olmoe" else 3
    values = (2, layers // 2, layers - last)
    return Boundaries(values, f"config.json states none: 2, L/2, L-{last} for {target.model_type} with L = {layers}")


def _override(name: str) -> Override:
    parts = re.split(r"[/\\]|--", name.lower())
    return next((OVERRIDES[part] for part in parts if part in OVERRIDES), Override())


def _checked(found: Boundaries, target: DecoderConfig) -> Boundaries:
    values, layers = found.values, target.num_hidden_layers
    increasing = all(low < high for low, high in zip(values, values[1:], strict=False))
    if not values or not increasing or values[0] < 0 or values[-1] > layers:
        raise UnsupportedConfig(
            f"expected strictly increasing boundaries from 0 to {layers}, as {target.model_type} has; got"
            f" {_listed(values)} ({found.origin}): name them explicitly"
        )
    return found


def _integers(values: Any, place: str) -> tuple[int, ...]:
    valid = isinstance(values, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not valid:
        raise UnsupportedConfig(f"expected {place} to be a list of integers; got {shown(values)}")
    return tuple(values)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
