"""Specs of decoding checked against a model and completed; the trees that they stand for by name."""

import dataclasses
import warnings
from pathlib import Path

from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, BudgetWarning, budget_warning, resolve
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.runtime.drafters import NAMES, Draft, check_drafted, default_tree, menu_of

NOTHING_DRAFTED = "expected speculative decoding to trace, simulate or adapt; this is plain decoding"


def resolved_spec(config: DecoderConfig, draft: Draft | None, directory: Path, spec: DecodingSpec) -> DecodingSpec:
    """Check a spec against a model and what drafts for it, and complete it (`Model.resolve`)."""
    drafts = draft is not None or spec.drafter is not None
    draft = draft if spec.drafter is None else None
    tree = (default_tree(draft) if drafts else None) if spec.tree == "default" else spec.tree
    if tree is None:
        if spec.budget is not None:
            raise RequestError("expected speculative decoding to budget the verification of; this is plain decoding")
        if any(given is not None for given in (spec.simulate_accept_length, spec.adapt)):
            raise RequestError(NOTHING_DRAFTED)
        return DecodingSpec(logprobs=spec.logprobs)
    if not drafts:
        raise RequestError(
            f"expected a draft head, or a drafter by name ({NAMES}), to draft a tree with; {directory} was loaded"
            " without one"
        )
    if not isinstance(tree, TreeConfig):
        for listed in menu_trees(draft, spec):
            check_drafted(draft, listed)
        if spec.simulate_accept_length is not None:
            raise RequestError("expected a tree to simulate the acceptance of; with auto, rounds have several")
    else:
        _check_tree(draft, spec, tree)
    return dataclasses.replace(spec, tree=tree, budget=_resolved_budget(config, spec.budget))


def menu_trees(draft: Draft | None, spec: DecodingSpec) -> list[TreeConfig]:
    """List the trees that `tree="auto"`, or a table of costs, chooses from."""
    if isinstance(spec.tree, CostTable):
        return list(spec.tree.trees)
    return list(menu_of(draft if spec.drafter is None else None))


def _check_tree(draft: Draft | None, spec: DecodingSpec, tree: TreeConfig) -> None:
    simulate = spec.simulate_accept_length
    if simulate is not None and not 1.0 <= simulate <= tree.longest_path:
        raise RequestError(
            f"expected an accept length from 1 to {tree.longest_path}, the longest path of the tree; got {simulate}"
        )
    check_drafted(draft, tree)


def _resolved_budget(config: DecoderConfig, budget: BudgetConfig | None) -> BudgetConfig | None:
    """Compute the budget of each layer."""
    if budget is None:
        return None
    try:
        budget = resolve(budget, config)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if warning := budget_warning(budget, config):
        warnings.warn(warning, BudgetWarning, stacklevel=5)
    return budget
