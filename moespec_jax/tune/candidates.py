"""Candidate settings, with the predicted speed of each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moespec_jax.checkpoint.head.read import LoadedBlockDraft, LoadedDraft
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.runtime.drafters import NGRAM_MENU, Draft, NamedDraft, check_drafted
from moespec_jax.tune.cost import Cost
from moespec_jax.tune.replay import replay

# Rules with a small loss at a budget, and the exact one (docs/budgets.md).
LOSSY_RULES: dict[str, dict[str, Any]] = {
    "path, squares": {},
    "faithfulness 0.3": dict(anchor="root", min_kept_weight=0.3),
    "guarantee 0, faithfulness 0.5": dict(anchor="likely", anchor_probability=0.0, min_kept_weight=0.5),
}
EXACT_RULES: dict[str, dict[str, Any]] = {
    "guarantee 0, faithfulness 1": dict(anchor="likely", anchor_probability=0.0, min_kept_weight=1.0),
}
# Trees that the cost of a round is fitted to: the corners of the search space, and some inside.
ANCHORS = [
    TreeConfig(0, 1, 2), TreeConfig(2, 1, 4), TreeConfig(6, 1, 8), TreeConfig(2, 2, 6), TreeConfig(4, 4, 16),
    TreeConfig(5, 8, 32), TreeConfig(7, 10, 60),
]  # fmt: skip
BUDGETED_ANCHORS = [TreeConfig(4, 4, 16), TreeConfig(7, 10, 60)]
# The grid of an EAGLE-3 head, whose trees are predicted.
DEPTH, TOP_KS, SIZES = 7, (1, 2, 4, 10), (4, 6, 8, 12, 16, 24, 32, 48, 60)
# Trees of n-grams, which are all timed: any depth costs the same, so that each size and width has one.
NGRAM_TREES = (
    TreeConfig(2, 1, 4),
    TreeConfig(6, 1, 8),
    TreeConfig(14, 1, 16),
    *NGRAM_MENU,
    TreeConfig(6, 4, 16),
    TreeConfig(14, 4, 32),
)
# The most trees of another drafter than an EAGLE-3 head, since each is timed.
MOST_TIMED = 32


class Candidate(NamedTuple):
    """Setting with its predicted speed.

    Fields:
        name: tree, budget and rule.
        spec: how to decode.
        accept_length: predicted number of tokens that a round gains.
        experts: predicted number of distinct experts that a layer reads in a round.
        round_s: predicted seconds of a round.
        loss: measured loss of a budget: `kl` in nats and `top1`, the share of equal first choices, each with its 95 %
            interval (`kl_95`, `top1_95`); None without a budget.
    """

    name: str
    spec: DecodingSpec
    accept_length: float
    experts: float
    round_s: float
    loss: dict[str, Any] | None = None

    @property
    def tokens_per_s(self) -> float:
        """Predicted speed."""
        return self.accept_length / self.round_s


def grid(depth: int, top_ks: Iterable[int], sizes: Iterable[int]) -> list[TreeConfig]:
    """List every tree of at most this depth with these widths and sizes. A chain has the one size that holds all of its
    nodes."""
    trees = []
    for top_k in top_ks:
        for d in range(depth + 1):
            if top_k == 1:
                trees.append(TreeConfig(d, 1, d + 2))
                continue
            pool = TreeConfig(d, top_k, 2).pool
            # The last levels are empty unless there are more nodes than levels; the first needs top-k besides the root.
            trees += [TreeConfig(d, top_k, size) for size in sizes if max(d + 2, top_k) < size <= pool + 1]
    return trees


def requested_grid(depth: int | None, top_ks: Sequence[int] | None, sizes: Sequence[int] | None) -> list[TreeConfig]:
    """List the grid of these depth, widths and sizes; None for the default.

    Raises:
        RequestError: a number is out of range.
    """
    try:
        return grid(DEPTH if depth is None else depth, top_ks or TOP_KS, sizes or SIZES)
    except ValueError as error:
        raise RequestError(str(error)) from None


def search_space(
    draft: Draft, depth: int | None, top_ks: Sequence[int] | None, sizes: Sequence[int] | None
) -> list[TreeConfig]:
    """List the trees to search: the requested grid, as far as the drafter drafts it. Without a request, of other
    drafters than EAGLE-3 heads all chains of the block, or trees that are worth a choice.

    Raises:
        RequestError: a number is out of range, or no tree is left, or too many to time them all.
    """
    trees = requested_grid(depth, top_ks, sizes)
    if isinstance(draft, LoadedDraft):
        return trees
    if depth is top_ks is sizes is None:
        return _own_trees(draft)
    drafted = [tree for tree in trees if _is_drafted(draft, tree)]
    if not 0 < len(drafted) <= MOST_TIMED:
        raise RequestError(
            f"expected 1 to {MOST_TIMED} trees that {draft.name} drafts, since all are timed; got {len(drafted)}: give"
            " other --tree-depth, --tree-top-ks or --tree-sizes, or none of them"
        )
    return drafted


def exact_candidates(
    trees: Sequence[TreeConfig], ranks: Mapping[int, np.ndarray], experts: Mapping[int, float], cost: Cost
) -> list[Candidate]:
    """Predict every tree without a budget; the fastest comes first.

    Args:
        trees: to predict.
        ranks: `replay.path_ranks` by top-k.
        experts: distinct experts that a layer reads, by measured tree size (`cost.interpolate_experts`).
        cost: of a round.
    """
    found = []
    for tree in trees:
        count = float(np.interp(tree.size, list(experts), list(experts.values())))
        length = replay(ranks[tree.top_k], tree).accept_length
        found.append(Candidate(tree.name, DecodingSpec(tree), length, count, cost.round_s(tree, count)))
    return sorted(found, key=lambda c: -c.tokens_per_s)


def timed_candidates(timed: Mapping[TreeConfig, tuple[float, float, float]]) -> list[Candidate]:
    """Make candidates of trees that were timed, by their measured tokens a round, experts and seconds; the fastest
    comes first."""
    found = [Candidate(tree.name, DecodingSpec(tree), *measured) for tree, measured in timed.items()]
    return sorted(found, key=lambda c: -c.tokens_per_s)


def trees_for_budgets(exact: Sequence[Candidate], budgets: Sequence[int], cost: Cost, count: int) -> list[TreeConfig]:
    """Choose the `count` trees that would be fastest if budgets cost no acceptance, at most two for each budget."""
    found: dict[TreeConfig, float] = {}
    for budget in budgets:
        speeds = {
            c.spec.tree: c.accept_length / cost.round_s(c.spec.tree, min(budget, c.experts))
            for c in exact
            if isinstance(c.spec.tree, TreeConfig) and c.experts > budget
        }
        for tree in sorted(speeds, key=lambda t: -speeds[t])[:2]:
            found[tree] = max(found.get(tree, 0.0), speeds[tree])
    return sorted(found, key=lambda t: -found[t])[:count]


def budgeted_candidate(
    tree: TreeConfig, rule_name: str, budget: BudgetConfig, measured: Mapping[str, Any], cost: Cost
) -> Candidate:
    """Predict a tree under a budget from its teacher forcing (`measured`, of `fidelity.summary`)."""
    name = f"{tree.name} B={budget.experts} {rule_name}"
    loss = {key: measured[key] for key in ("kl", "kl_95", "top1", "top1_95")}
    length, experts = measured["accept_length"], measured["experts_read"]
    return Candidate(name, DecodingSpec(tree, budget), length, experts, cost.round_s(tree, experts), loss)


def _own_trees(draft: LoadedBlockDraft | NamedDraft) -> list[TreeConfig]:
    """List all chains of a block; of n-grams trees of each size and width; of the target itself all short chains."""
    if isinstance(draft, LoadedBlockDraft):
        return [TreeConfig(depth, 1, depth + 2) for depth in range(draft.config.drafted)]
    if draft.name == "ngram":
        return list(NGRAM_TREES)
    deepest = max(tree.depth for tree in draft.menu)
    return [TreeConfig(depth, 1, depth + 2) for depth in range(deepest + 1)]


def _is_drafted(draft: Draft, tree: TreeConfig) -> bool:
    try:
        check_drafted(draft, tree)
    except RequestError:
        return False
    return True
