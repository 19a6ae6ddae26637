"""Measurements of a study, task by task: the value of each is in a ledger before the next begins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.fidelity import Texts, summary
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.prompt_sets import HELD_OUT, PIECE, continued, held_out_pieces
from moespec_jax.measure.teacher_forcing import ForcedStats
from moespec_jax.measure.timing import TimingCase, time_interleaved
from moespec_jax.runtime.model import Model
from moespec_jax.study.coactivation import count_pairs
from moespec_jax.study.demand import kept_mass, unions
from moespec_jax.study.reconstruction import Loss, loss, outputs
from moespec_jax.study.routing import TreeRouting, observed_rounds, text_experts
from moespec_jax.study.rules import RULES, rule_of

# Kinds of text after a prompt: the target's continuation, or that of the source.
OWN, GIVEN = "own text", "given text"
# Number of last rounds whose expert outputs are reconstructed, and of layers whose pairs of experts are counted.
RECONSTRUCTED, COUNTED = 2, 3
# Name in the ledger, and function that computes the value.
Task = tuple[str, Callable[[], Any]]


class Plan(NamedTuple):
    """Settings of the measurements.

    Fields:
        tree: shape of all trees.
        tokens: number of tokens of each text after its prompt.
        batch: number of texts that run at once.
        rounds: number of rounds after each prompt whose routing is recorded.
        rules: names of the compared rules.
        budgets: numbers of experts at which they are compared.
        timed: names of the timed rules.
        timed_budgets: numbers of experts at which they are timed.
        timed_prompts: number of prompts of each set that are timed, the first ones; 0 times nothing.
        timed_tokens: number of new tokens of each timed prompt.
        repeats: number of turns.
    """

    tree: TreeConfig
    tokens: int
    batch: int
    rounds: int
    rules: list[str]
    budgets: list[int]
    timed: list[str]
    timed_budgets: list[int]
    timed_prompts: int
    timed_tokens: int
    repeats: int


def measure(model: Model, plan: Plan, sets: Mapping[str, Sequence[Sequence[int]]], ledger: Ledger) -> None:
    """Run every task that the ledger lacks, then the timing, beside which nothing else runs."""
    tasks = [task for name, prompts in sets.items() for task in SetStudy(model, plan, name, prompts, ledger).tasks()]
    with tqdm(total=len(tasks), unit="task", disable=None) as bar:
        while tasks:
            name, run = tasks.pop(0)  # so that a set's shared results are freed after its last task
            bar.set_description(name)
            ledger.task(name, run)
            bar.update()
    if plan.timed_prompts:
        for name, prompts in sets.items():
            timed, cases = prompts[: plan.timed_prompts], timed_cases(plan)
            time_interleaved(model, timed, cases, plan.timed_tokens, plan.repeats, ledger, label=f"{name}: turn")


class SetStudy:
    """Tasks of one set of prompts, and the intermediate results that they share."""

    def __init__(self, model: Model, plan: Plan, name: str, prompts: Sequence[Sequence[int]], ledger: Ledger):
        self._model, self._plan, self._name, self._prompts, self._ledger = model, plan, name, prompts, ledger

    def tasks(self) -> Iterator[Task]:
        """Yield the tasks in the order in which they can run."""
        yield f"{self._name}: continuations", self._continue
        yield f"{self._name}: demand", self._demand
        yield f"{self._name}: coactivation", self._coactivation
        for rule in self._plan.rules:
            for budget in self._plan.budgets:
                yield reconstruction_key(self._name, rule, budget), partial(self._reconstruct, rule, budget)
        for kind in kinds(self._name):
            yield exact_key(self._name, kind), partial(self._teacher_force, kind, None, None)
            for rule in self._plan.rules:
                for budget in self._plan.budgets:
                    yield forced_key(self._name, kind, rule, budget), partial(self._teacher_force, kind, rule, budget)

    def _continue(self) -> list[list[int]]:
        batch, prompts = self._plan.batch, self._prompts
        parts = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        return [text for part in parts for text in continued(self._model, part, self._plan.tokens + 1)]

    def _demand(self) -> dict[str, Any]:
        found = [(unions(seen), kept_mass(seen)) for seen in self._observed]
        union, mass = (np.concatenate(values, axis=1) for values in zip(*found, strict=True))
        return {
            "trees": union.shape[1],
            "unions": union.mean(axis=1).round(6).tolist(),
            "kept_mass": mass.mean(axis=1).round(6).tolist(),
        }

    def _coactivation(self) -> dict[str, Any]:
        experts = text_experts(self._model, self._ledger.get(f"{self._name}: continuations"), self._plan.batch)
        count = self._model.config.num_experts
        return {str(layer): count_pairs(experts[layer], count).tolist() for layer in counted_layers(len(experts))}

    def _reconstruct(self, rule: str, budget: int) -> dict[str, Any]:
        """Sum the fields of `Loss` over the trees of the last rounds."""
        config = BudgetConfig(self._model.config.num_experts, **RULES[rule])
        parts = [loss(self._model, seen, config, budget, exact) for seen, exact in self._last_rounds]
        sums = {name: sum(np.asarray(getattr(part, name), np.float64) for part in parts) for name in Loss._fields}
        return {name: np.asarray(total).tolist() for name, total in sums.items()}

    def _teacher_force(self, kind: str, rule: str | None, budget: int | None) -> dict[str, Any]:
        config = None if rule is None else BudgetConfig(self._model.config.num_experts, **RULES[rule])
        stats = self._texts[kind].teacher_force(config, budget)
        return summary(stats) | _by_text(stats)

    @cached_property
    def _texts(self) -> dict[str, Texts]:
        own = self._ledger.get(f"{self._name}: continuations")
        texts, prompts = {OWN: own}, {OWN: [len(prompt) for prompt in self._prompts]}
        if GIVEN in kinds(self._name):
            texts[GIVEN] = held_out_pieces(self._model, len(own), PIECE + self._plan.tokens + 1)
            prompts[GIVEN] = [PIECE] * len(own)
        plan = self._plan
        return {kind: Texts(self._model, plan.tree, texts[kind], prompts[kind], plan.batch) for kind in texts}

    @cached_property
    def _observed(self) -> list[TreeRouting]:
        """Routing of all rounds; only the last keep their inputs, which are large."""
        plan, found = self._plan, []
        for number, seen in enumerate(observed_rounds(self._model, plan.tree, self._prompts, plan.rounds, plan.batch)):
            late = number % plan.rounds >= plan.rounds - RECONSTRUCTED
            found.append(seen if late else seen._replace(inputs=seen.inputs[..., :0]))
        return found

    @cached_property
    def _last_rounds(self) -> list[tuple[TreeRouting, Any]]:
        late = [seen for seen in self._observed if seen.inputs.size]
        return [(seen, outputs(self._model, seen)) for seen in late]


def timed_cases(plan: Plan) -> dict[str, TimingCase]:
    """List the timed cases by name: plain decoding, the tree without a budget, and every timed rule and budget."""
    found = {"plain": TimingCase(), "exact": TimingCase(DecodingSpec(plan.tree))}
    for rule in plan.timed:
        for budget in plan.timed_budgets:
            found[f"{rule}, B = {budget}"] = TimingCase(DecodingSpec(plan.tree, rule_of(rule, budget)))
    return found


def kinds(name: str) -> list[str]:
    """List the kinds of text of a set; only held-out modules have a given text."""
    return [OWN, GIVEN] if name == HELD_OUT else [OWN]


def counted_layers(layers: int) -> list[int]:
    """Choose the sparse layers whose pairs of experts are counted, evenly from the first to the last."""
    return sorted(set(np.linspace(0, layers - 1, COUNTED).round().astype(int).tolist()))


def exact_key(name: str, kind: str) -> str:
    """Ledger key of teacher forcing without a budget."""
    return f"{name}: {kind}, exact"


def forced_key(name: str, kind: str, rule: str, budget: int) -> str:
    """Ledger key of teacher forcing under a budget."""
    return f"{name}: {kind}, {rule}, B = {budget}"


def reconstruction_key(name: str, rule: str, budget: int) -> str:
    """Ledger key of a rule's reconstruction errors under a budget."""
    return f"{name}: reconstruction, {rule}, B = {budget}"


def timed_key(name: str, turn: int, case: str) -> str:
    """Ledger key of a timed case in one of a set's turns (`time_interleaved`)."""
    return f"{name}: turn {turn}, {case}"


def _by_text(stats: ForcedStats) -> dict[str, Any]:
    """Number of rounds of each text, and of those that committed a node of each depth."""
    return {
        "rounds_by_text": stats.rounds.astype(int).tolist(),
        "committed_by_text": stats.committed.astype(int).tolist(),
    }
