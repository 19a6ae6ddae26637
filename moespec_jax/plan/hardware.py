"""Kinds of hardware that the command sizes a model up for: slices of TPU chips, and NVIDIA cards."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moespec_jax.errors import RequestError
from moespec_jax.nn.quantization import Quantization
from moespec_jax.plan.card_sizing import MARGIN, has_compiler, size_up_cards
from moespec_jax.plan.cards import default_names, parse_machine
from moespec_jax.plan.program import Load
from moespec_jax.plan.table import LEGEND, cards_table, table


class Hardware(NamedTuple):
    """Hardware of one kind.

    Fields:
        names: what to size up, from the smallest of each chip.
        requested: whether the names were requested; otherwise those after the first that fits are left out.
        chip: finds the chip of a name.
        size_up: computes a row; raises `ValueError` where the model cannot be sharded over it.
        table: formats rows.
        versions: finds the versions of what compiles.
        notes: what is missing.
        legend: what follows the table.
    """

    names: Sequence[str]
    requested: bool
    chip: Callable[[str], str]
    size_up: Callable[[Load, str, Quantization | None], dict[str, Any]]
    table: Callable[[Sequence[dict[str, Any]]], str]
    versions: Callable[[], dict[str, str]]
    notes: Sequence[str] = ()
    legend: str = ""


def cards_of(names: Sequence[str]) -> Hardware:
    """Describe NVIDIA cards of these names; without any, of all.

    Raises:
        RequestError: there is no such card.
    """
    for name in names:
        parse_machine(name)

    def versions() -> dict[str, str]:
        from moespec_jax.plan.cuda import installed_versions

        return installed_versions()

    missing = (
        f"{MARGIN:.0%} of a card or more are kept free for temporary memory; to have it counted, without a GPU:"
        ' pip install "jax[cuda12]"'
    )
    return Hardware(
        names or default_names(), bool(names), lambda name: parse_machine(name)[0], size_up_cards, cards_table,
        versions, () if has_compiler() else (missing,), LEGEND,
    )  # fmt: skip


def slices_of(names: Sequence[str] | None) -> Hardware:
    """Describe slices of TPU chips of these names; None for all.

    Raises:
        RequestError: there is no such slice, or the TPU compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RequestError(
            "expected the TPU compiler, which needs no TPU: pip install libtpu; or, for GPUs, --cards, which needs none"
        )
    # Imported here: the module configures JAX for compilation without devices.
    from moespec_jax.plan.ahead import versions
    from moespec_jax.plan.sizing import SLICES, size_up

    if unknown := [name for name in names or () if name not in SLICES]:
        raise RequestError(f"expected --slices of {', '.join(SLICES)}; got {', '.join(unknown)}")
    return Hardware(
        names or list(SLICES), names is not None, lambda name: name.partition("-")[0], size_up, table, versions
    )
