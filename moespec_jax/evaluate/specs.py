"""Specs to compare: plain decoding, exact speculation, and speculation under budgets."""

import dataclasses
from typing import Any

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, is_exact
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.measure.teacher_forcing import restrict_alone
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run


@dataclasses.dataclass(frozen=True)
class EvaluatedSpec:
    """A resolved spec.

    Fields:
        name: in rows of results.
        spec: how texts are decoded or verified.
        exact: whether the output is the model's own.
    """

    name: str
    spec: DecodingSpec
    exact: bool

    def columns(self) -> dict[str, Any]:
        """Columns of a row of results."""
        return {
            "way": self.name,
            "exact": self.exact,
            "tree": dataclasses.asdict(self.spec.tree) if isinstance(self.spec.tree, TreeConfig) else None,
            "budget": None if self.spec.budget is None else self.spec.budget.as_dict(),
        }


def evaluated_spec(model: Model, spec: DecodingSpec) -> EvaluatedSpec:
    """Resolve a spec for a model.

    Warns:
        BudgetWarning: the budget is so tight that quality is likely to suffer.

    Raises:
        RequestError: the model cannot decode by this spec.
    """
    spec = model.resolve(spec)
    if spec.budget is None:
        return EvaluatedSpec(spec.tree_name, spec, True)
    name = f"{spec.tree_name}, B = {_experts(spec.budget)}"
    return EvaluatedSpec(name, spec, is_exact(spec.budget, model.config, 1))


def speculative_method(model: Model, evaluated: EvaluatedSpec, sampling: SamplingConfig) -> Speculative[Any, Any]:
    """Make the speculative method of a spec; its budget chooses experts for each sequence separately.

    So the output for a text does not depend on the other texts of its batch.
    """
    method = model.speculative(evaluated.spec, sampling)
    return method if method.budget is None else dataclasses.replace(method, restrict=restrict_alone)


def start_run(model: Model, evaluated: EvaluatedSpec, sampling: SamplingConfig, batch: Batch) -> Run[Any, Any, Any]:
    """Make the run of one batch, before prefill."""
    if evaluated.spec.tree is None:
        return Run(model.programs, model.autoregressive(sampling), model.params, batch)
    return Run(model.programs, speculative_method(model, evaluated, sampling), model.speculative_params, batch)


def _experts(budget: BudgetConfig) -> str:
    """Format the experts of a resolved budget: one number, or those of all layers where they differ."""
    assert isinstance(budget.experts, tuple)
    same = len(set(budget.experts)) == 1
    return str(budget.experts[0]) if same else "/".join(map(str, budget.experts))
