"""Settings of an expert budget, checked against the model they are for. The rules are in `budget_rules.py`."""

import dataclasses
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.budget_rules import (
    ANCHORS,
    COVERAGES,
    EXPERT_WEIGHTS,
    SCORES,
    SIZES,
    Anchor,
    Coverage,
    ExpertWeight,
    Score,
    Size,
)
from moespec_jax.errors import RequestError, shown_value, wrong_type

_TABLES: dict[str, Mapping[str, object]] = {
    "score": SCORES, "credit": EXPERT_WEIGHTS, "anchor": ANCHORS, "size": SIZES, "coverage": COVERAGES,
}  # fmt: skip


class BudgetWarning(UserWarning):
    """A budget is so tight that quality is likely to suffer."""


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """How many experts a layer may read in a verification, and by which rule they are chosen (docs/budgets.md).

    A rule is the name of a built-in one or a function of the same signature (`budget_rules.py`). Functions are compared
    by identity: keep one for all calls, or every call compiles anew. MoE-Spec's own rule (arXiv:2602.16052) is score
    `probability` with credit `all`; the defaults diverged less from the exact target at every budget that was measured.

    Fields:
        experts: number of experts, or their fraction as a float, for all sparse layers or one for each.
        coverage: where rows go whose experts are not read.
        score: weight of each row in the experts' scores.
        credit: what a row contributes to the score of each expert.
        anchor: rows whose own experts precede all others.
        size: how many of the `experts` are read.
        mass: share of the scores that size `mass` keeps.
        anchor_probability: path probability from which anchor `likely` includes a row.
        min_kept_weight: a row is pruned with its descendants where a layer keeps less than this share of the combine
            weight of its own experts. 0 prunes none; 1 with anchor `root` or `likely` makes the output exact.
        groups: number of equal groups of consecutive experts among which the budget is divided evenly, rounded up. With
            as many as a mesh has expert shards, no device reads more than its share.

    Raises:
        RequestError: a field has a wrong type, a number is out of its range, or there is no such rule.
    """

    experts: int | float | tuple[int | float, ...]
    coverage: str | Coverage = "substitute"
    score: str | Score = "path"
    credit: str | ExpertWeight = "squares"
    anchor: str | Anchor = "none"
    size: str | Size = "fixed"
    mass: float = 0.9
    anchor_probability: float = 0.5
    min_kept_weight: float = 0.0
    groups: int = 1

    def __post_init__(self) -> None:
        given = self.experts if isinstance(self.experts, tuple) else (self.experts,)
        if not all(isinstance(number, Real) for number in given):
            raise wrong_type("experts of a budget", "a number, or a tuple with one for each layer", self.experts)
        for name, table in _TABLES.items():
            rule = getattr(self, name)
            if not callable(rule) and (not isinstance(rule, str) or rule not in table):
                raise RequestError(
                    f"expected a budget's {name} of {', '.join(table)}, or a function; got {shown_value(rule)}"
                )
        for name in ("mass", "anchor_probability", "min_kept_weight"):
            if not isinstance(getattr(self, name), Real):
                raise wrong_type(f"{name} of a budget", "a number", getattr(self, name))
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise RequestError(f"expected a budget's {name} from 0 to 1, got {getattr(self, name)}")
        if not isinstance(self.groups, Integral):
            raise wrong_type("groups of a budget", "a whole number", self.groups)
        if self.groups < 1:
            raise RequestError(f"expected a budget of at least one group of experts, got {self.groups}")

    @property
    def name(self) -> str:
        """Number or fraction of experts, or those of each layer between commas."""
        return ",".join(f"{e:g}" for e in self.experts) if isinstance(self.experts, tuple) else f"{self.experts:g}"

    @property
    def slots(self) -> int:
        """Largest number of experts that a layer reads under a resolved budget."""
        return -(-max(_counts(self)) // self.groups) * self.groups

    @property
    def by_score_alone(self) -> bool:
        """Whether experts are ranked by their scores alone, by built-in rules, and every row keeps its place."""
        fixed = (self.anchor, self.size, self.coverage, self.groups) == ("none", "fixed", "substitute", 1)
        return fixed and not self.prunes and isinstance(self.credit, str)

    @property
    def prunes(self) -> bool:
        """Test whether rows may leave the tree."""
        return self.min_kept_weight > 0

    def rule(self, name: str) -> Any:  # a function whose type depends on the name
        """Function of a field: the one given, or the built-in one of that name."""
        given = getattr(self, name)
        return given if callable(given) else _TABLES[name][given]

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them; a function is given by its name in Python."""
        return {
            field.name: _function_name(value) if callable(value) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }


def resolve(budget: BudgetConfig, config: DecoderConfig) -> BudgetConfig:
    """Give each sparse layer of a model its whole number of experts.

    Raises:
        ValueError: a number is below what one token needs or above what there is, or there are not as many as layers.
    """
    layers, total, k = config.num_sparse_layers, config.num_experts, config.num_experts_per_tok
    if layers == 0:
        raise ValueError("expected a model with experts to budget; it has none")
    if total % budget.groups:
        raise ValueError(f"expected a budget's groups to divide the {total} experts; got {budget.groups}")
    given = budget.experts if isinstance(budget.experts, tuple) else (budget.experts,) * layers
    if len(given) != layers:
        raise ValueError(f"expected one expert budget, or one for each of {layers} sparse layers; got {len(given)}")
    counts = []
    for number in given:
        fraction = isinstance(number, float)
        count = round(number * total) if fraction and 0.0 <= number <= 1.0 else number
        if not isinstance(count, int) or not k <= count <= total:
            span = f"{k / total:g} to 1" if fraction else f"{k} to {total}"
            raise ValueError(
                f"expected an expert budget from {span}: one token goes to {k} of {total} experts; got {number}"
            )
        counts.append(count)
    return dataclasses.replace(budget, experts=tuple(counts))


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rename fields of older files and flags: `faithfulness`, `guarantee`, and the coverage `guarantee`,
    which is anchor `likely` with coverage `substitute`."""
    fields = {_RENAMED.get(name, name): value for name, value in fields.items()}
    if fields.get("coverage") == "guarantee":
        fields |= {"coverage": "substitute", "anchor": "likely"}
    return fields


_RENAMED = {"faithfulness": "min_kept_weight", "guarantee": "anchor_probability"}


def budget_warning(budget: BudgetConfig, config: DecoderConfig) -> str | None:
    """Warning about a resolved budget below twice one token's experts, where published results are bad; None else."""
    least = min(_counts(budget))
    if least >= 2 * config.num_experts_per_tok or least == config.num_experts or budget.min_kept_weight >= 1:
        return None
    return (
        f"an expert budget of {least} is below twice the {config.num_experts_per_tok} experts of one token: the output"
        " may be much worse than the model's own"
    )


def is_exact(budget: BudgetConfig, config: DecoderConfig, batch: int) -> bool:
    """Test whether a resolved budget leaves the output exact: all experts are read, or every row that loses one is
    pruned. Roots are never pruned, so in the second case the experts of all roots of the batch must fit."""
    if callable(budget.coverage):
        return False
    least = min(_counts(budget))
    if budget.size == "fixed" and least == config.num_experts:
        return True
    # In groups, experts that precede all others may still exceed their group's share.
    if budget.min_kept_weight < 1 or budget.groups > 1 or budget.anchor not in ("root", "likely"):
        return False
    # A size that follows the text is at least one token's experts.
    read = least if budget.size == "fixed" else config.num_experts_per_tok
    return read >= batch * config.num_experts_per_tok


def _counts(budget: BudgetConfig) -> tuple[int, ...]:
    assert isinstance(budget.experts, tuple)
    return tuple(count for count in budget.experts if isinstance(count, int))


def _function_name(function: Any) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
