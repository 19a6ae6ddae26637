"""The requested way of decoding: tree, budget and drafter."""

import dataclasses
from typing import Any, Literal

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.decoding.drafter import Drafter
from moespec_jax.decoding.speculative import Adapt


@dataclasses.dataclass(frozen=True)
class DecodingSpec:
    """How to decode: plainly where `tree` is None, exactly where `budget` is None too.

    Fields:
        tree: shape of the draft tree; None decodes plainly, "default" stands for the model's own choice, and with
            "auto" every round has the shape that pays most (`menu.Menu`), with a table of costs by these.
        budget: expert budget of the verification.
        simulate_accept_length: accept this many tokens a round on average, for timing; the text is meaningless.
        drafter: in place of the model's draft head.
        adapt: replaces functions of the method (`speculative.Speculative`).
        logprobs: number of most probable tokens that are recorded with the log-probability of every token; None records
            nothing.
    """

    tree: TreeConfig | Literal["default", "auto"] | CostTable | None = None
    budget: BudgetConfig | None = None
    simulate_accept_length: float | None = None
    drafter: Drafter[Any, Any] | None = None  # of any kind of parameters and state
    adapt: Adapt | None = None
    logprobs: int | None = None

    @property
    def chooses(self) -> bool:
        """Test whether every round chooses its shape."""
        return self.tree == "auto" or isinstance(self.tree, CostTable)

    @property
    def tree_name(self) -> str:
        """`60/7/10` (size/depth/top-k), `plain`, `default` or `auto`."""
        if isinstance(self.tree, CostTable):
            return "auto"
        return self.tree.name if isinstance(self.tree, TreeConfig) else self.tree or "plain"

    @property
    def name(self) -> str:
        """`60/7/10 B=0.5`, `4/2/1`, `plain`."""
        return self.tree_name + ("" if self.budget is None else f" B={self.budget.name}")
