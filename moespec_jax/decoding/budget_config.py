"""The settings of an expert budget, checked against the model it is for. What the names do is in `budget.py`."""

import dataclasses

from moespec_jax.config import DecoderConfig


class BudgetWarning(UserWarning):
    """A budget is so tight that the output is likely to suffer."""


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """How many experts a layer may read in a verifying pass, and by which rule.

    `experts` is a number of experts or a fraction of them (a float), for all sparse layers or one for each. The other
    names are entries of the tables in `budget.py`. MoE-Spec's own rule is score `probability`, credit `all`; the
    default is what measured better at every budget (docs/budgets.md):

    - `score`: how much each drafted token counts; `credit`: what it says of each expert;
    - `anchor`: whose experts precede all others; `size`: how many of the `experts` are used, with the share `mass` of
      the scores that size `mass` keeps;
    - `coverage`: what becomes of tokens whose experts are not read; under `guarantee`, tokens whose chance of being
      accepted is at least `guarantee` keep theirs as far as the budget goes.
    - `groups`: the budget is divided evenly, rounded up, among so many groups of consecutive experts, each ranked by
      itself. 1 ranks all together (global). As many as there are shards of experts on a mesh make it balanced: no
      device reads more than its share.
    - `faithfulness`: a drafted token is given up, with all that follow from it, where a layer keeps less than this
      share of the weight of its own experts. 0 gives up none; at 1 what comes out is the target's own, exactly.

    Raises:
        ValueError: a number is out of its range.
    """

    experts: int | float | tuple[int | float, ...]
    coverage: str = "substitute"
    score: str = "path"
    credit: str = "squares"
    anchor: str = "none"
    size: str = "fixed"
    mass: float = 0.9
    guarantee: float = 0.5
    faithfulness: float = 0.0
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("mass", "guarantee", "faithfulness"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"expected a budget's {name} from 0 to 1, got {getattr(self, name)}")
        if self.groups < 1:
            raise ValueError(f"expected a budget of at least one group of experts, got {self.groups}")

    @property
    def slots(self) -> int:
        """The most experts that a layer reads under a resolved budget."""
        return -(-max(_counts(self)) // self.groups) * self.groups

    @property
    def gives_up(self) -> bool:
        """Whether drafted tokens may leave the tree."""
        return self.faithfulness > 0


def resolve(budget: BudgetConfig, config: DecoderConfig) -> BudgetConfig:
    """The same rule with a whole number of experts for each sparse layer of a model.

    Raises:
        ValueError: a budget is below what one token needs or above what there is, or there are not as many as layers.
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
    for asked in given:
        fraction = isinstance(asked, float)
        count = round(asked * total) if fraction and 0.0 <= asked <= 1.0 else asked
        if not isinstance(count, int) or not k <= count <= total:
            span = f"{k / total:g} to 1" if fraction else f"{k} to {total}"
            raise ValueError(
                f"expected an expert budget from {span}: one token goes to {k} of {total} experts; got {asked}"
            )
        counts.append(count)
    return dataclasses.replace(budget, experts=tuple(counts))


def caution(budget: BudgetConfig, config: DecoderConfig) -> str | None:
    """What to warn of in a resolved budget: published experience below twice a token's own experts is bad."""
    least = min(_counts(budget))
    if least >= 2 * config.num_experts_per_tok or least == config.num_experts or budget.faithfulness >= 1:
        return None
    return (
        f"an expert budget of {least} is below twice the {config.num_experts_per_tok} experts of one token: the output"
        " may be much worse than the model's own"
    )


def is_exact(budget: BudgetConfig, config: DecoderConfig, batch: int) -> bool:
    """Whether nothing is lost under a resolved budget: all experts may be read, or every token whose experts are not
    all read is given up. Then the experts of all roots must fit, for roots are never given up."""
    least = min(_counts(budget))
    if budget.size == "fixed" and least == config.num_experts:
        return True
    # In groups, what precedes all others may still not fit its own group.
    if budget.faithfulness < 1 or budget.groups > 1 or (budget.anchor == "none" and budget.coverage != "guarantee"):
        return False
    # A size that follows the text is at least one token's experts.
    surely = least if budget.size == "fixed" else config.num_experts_per_tok
    return surely >= batch * config.num_experts_per_tok


def _counts(budget: BudgetConfig) -> tuple[int, ...]:
    assert isinstance(budget.experts, tuple)
    return tuple(count for count in budget.experts if isinstance(count, int))
