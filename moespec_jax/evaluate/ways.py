"""Ways of decoding that are held against each other: plainly, speculating exactly, and under a budget."""

import dataclasses
import warnings
from typing import Any

import jax.numpy as jnp
from jax import Array

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget import Nodes, check_names
from moespec_jax.decoding.budget_config import BudgetConfig, BudgetWarning, caution, is_exact, resolve
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import SpeculationSettings
from moespec_jax.decoding.tree import check_draft_vocabulary
from moespec_jax.errors import RequestError
from moespec_jax.measure.teacher_forcing import restrict_each
from moespec_jax.nn.routing import Restricted, Routing
from moespec_jax.runtime.method import Method
from moespec_jax.runtime.model import DEFAULT_TREE, AskedTree, Model


@dataclasses.dataclass(frozen=True)
class Way:
    """How texts are decoded: plainly without a `tree`, exactly without a `budget`, which is resolved. `exact` says
    whether what comes out is the model's own."""

    name: str
    tree: TreeConfig | None
    budget: BudgetConfig | None
    exact: bool

    def about(self) -> dict[str, Any]:
        """For a row of results."""
        return {
            "way": self.name,
            "exact": self.exact,
            "tree": None if self.tree is None else dataclasses.asdict(self.tree),
            "budget": None if self.budget is None else dataclasses.asdict(self.budget),
        }

    def method(self, model: Model, sampling: SamplingConfig) -> Method:
        """The programs that decode so. Under a budget every sequence is a batch of its own to it, so that a text does
        not depend on its neighbours."""
        method = model.method(sampling, self.tree, self.budget)
        if self.budget is None:
            return method
        assert isinstance(method.settings, SpeculationSettings)
        return method._replace(settings=method.settings._replace(restrict=restrict_alone))


def way_of(model: Model, tree: AskedTree, budget: BudgetConfig | None) -> Way:
    """A way that a model can go; of the tree "default", as `Model.generate` takes it.

    Warns:
        BudgetWarning: the budget is so tight that the output suffers.

    Raises:
        RequestError: there is no draft head for the tree, no tree for the budget, or no such budget.
    """
    if tree == "default":
        tree = None if model.draft is None else DEFAULT_TREE
    if tree is None:
        if budget is not None:
            raise RequestError("expected speculative decoding to budget the verification of; this is plain decoding")
        return Way("plain", None, None, True)
    if model.draft is None:
        raise RequestError(f"expected a draft head to draft a tree with; {model.directory} was loaded without one")
    shape = f"{tree.size}/{tree.depth}/{tree.top_k}"
    try:
        check_draft_vocabulary(tree, model.draft.config.draft_vocab_size)
        if budget is None:
            return Way(shape, tree, None, True)
        check_names(budget)
        resolved = resolve(budget, model.config)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if warning := caution(resolved, model.config):
        warnings.warn(warning, BudgetWarning, stacklevel=2)
    return Way(f"{shape}, B = {_count(resolved)}", tree, resolved, is_exact(resolved, model.config, 1))


def restrict_alone(
    rule: BudgetConfig, nodes: Nodes, norm_topk_prob: bool, layer: int | Array,
    probabilities: Array, natural: Routing, valid: Array,
) -> Restricted:  # fmt: skip
    """As `budget.restrict`, with every sequence a batch of its own."""
    every = jnp.int32(probabilities.shape[-1])
    return restrict_each(every, rule, nodes, norm_topk_prob, layer, probabilities, natural, valid)


def _count(budget: BudgetConfig) -> str:
    assert isinstance(budget.experts, tuple)
    same = len(set(budget.experts)) == 1
    return str(budget.experts[0]) if same else "/".join(map(str, budget.experts))
