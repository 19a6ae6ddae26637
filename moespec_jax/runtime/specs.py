"""Specs of decoding checked against a model and completed; the trees that they stand for by name."""

import dataclasses
import warnings
from pathlib import Path

from moespec_jax.checkpoint.head.read import LoadedDraft
from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, BudgetWarning, budget_warning, resolve
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.tree import check_draft_vocabulary
from moespec_jax.errors import RequestError

# The tree where none is given. On CPU it is the fastest that was measured with the embedded pair; elsewhere it is what
# published heads for MoE targets are served with.
DEFAULT_TREE = TreeConfig(depth=2, top_k=1, size=4)
# Trees that `tree="auto"` chooses from, beside plain decoding: a short and a longer chain, a small and a large tree.
MENU = (TreeConfig(1, 1, 3), TreeConfig(3, 1, 5), TreeConfig(4, 4, 16), TreeConfig(7, 10, 60))
NOTHING_DRAFTED = "expected speculative decoding to trace, simulate or adapt; this is plain decoding"


def resolved_spec(
    config: DecoderConfig, draft: LoadedDraft | None, directory: Path, spec: DecodingSpec
) -> DecodingSpec:
    """Check a spec against a model and its draft head, and complete it (`Model.resolve`)."""
    drafts = draft is not None or spec.drafter is not None
    tree = (DEFAULT_TREE if drafts else None) if spec.tree == "default" else spec.tree
    if tree is None:
        if spec.budget is not None:
            raise RequestError("expected speculative decoding to budget the verification of; this is plain decoding")
        if any(given is not None for given in (spec.simulate_accept_length, spec.adapt)):
            raise RequestError(NOTHING_DRAFTED)
        return DecodingSpec()
    if not drafts:
        raise RequestError(f"expected a draft head to draft a tree with; {directory} was loaded without one")
    if tree == "auto":
        if spec.simulate_accept_length is not None:
            raise RequestError("expected a tree to simulate the acceptance of; with auto, rounds have several")
    else:
        _check_tree(draft, spec, tree)
    return dataclasses.replace(spec, tree=tree, budget=_resolved_budget(config, spec.budget))


def menu_trees(draft: LoadedDraft | None, spec: DecodingSpec) -> list[TreeConfig]:
    """List the trees of `MENU` that the drafter can draft."""
    if draft is None or spec.drafter is not None:
        return list(MENU)
    return [tree for tree in MENU if tree.top_k <= draft.config.draft_vocab_size]


def _check_tree(draft: LoadedDraft | None, spec: DecodingSpec, tree: TreeConfig) -> None:
    simulate = spec.simulate_accept_length
    if simulate is not None and not 1.0 <= simulate <= tree.longest_path:
        raise RequestError(
            f"expected an accept length from 1 to {tree.longest_path}, the longest path of the tree; got {simulate}"
        )
    if draft is not None and spec.drafter is None:
        try:
            check_draft_vocabulary(tree, draft.config.draft_vocab_size)
        except ValueError as error:
            raise RequestError(str(error)) from None


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
