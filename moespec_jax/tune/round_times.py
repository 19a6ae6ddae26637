"""Timed rounds as costs of a profile, by which every round can choose its shape (`--speculate auto`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.timing import TimingCase
from moespec_jax.runtime.round_costs import RoundCosts, cost_fields


class Timed(NamedTuple):
    """Rounds of one setting in every turn.

    Fields:
        spec: how to decode.
        seconds: of a round, mean of a turn.
        tokens: that a round gained, likewise.
    """

    spec: DecodingSpec
    seconds: list[float]
    tokens: list[float]


def timed_rounds(cases: Mapping[str, TimingCase], turns: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Timed]:
    """List the rounds of every case."""
    found = []
    for name, case in cases.items():
        own = [turn[name] for turn in turns]
        seconds = [stats["decode_s"] / stats["rounds"] for stats in own]
        found.append(Timed(case.spec, seconds, [stats["accept_length"] for stats in own]))
    return found


def cost_tables(timed: Sequence[Timed], identity: Callable[[DecodingSpec], dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one table of costs for no budget and for each budget, each with plain decoding and the trees timed so.

    `identity` lists what the costs of a spec depend on. A setting that was timed twice has all its measurements.
    """
    tables: dict[BudgetConfig | None, dict[str, Timed]] = {}
    for one in timed:
        shapes = tables.setdefault(one.spec.budget, {})
        before = shapes.get(one.spec.tree_name, Timed(one.spec, [], []))
        shapes[one.spec.tree_name] = Timed(one.spec, before.seconds + one.seconds, before.tokens + one.tokens)
    plain = tables[None]["plain"]
    found = []
    for budget, shapes in tables.items():
        own = {"plain": plain, **{name: shape for name, shape in shapes.items() if name != "plain"}}
        costs = RoundCosts([shape.seconds for shape in own.values()], [shape.tokens for shape in own.values()])
        about = identity(DecodingSpec("auto", budget)) | {"shapes": list(own)[1:]}
        found.append(cost_fields(about, list(own), costs))
    return found
