"""Ways to decode, timed in turns on the same prompts in one process."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.errors import RequestError
from moespec_jax.measure.ledger import Ledger
from moespec_jax.runtime.model import Model


class Setting(NamedTuple):
    """How to decode: plainly where `tree` is None, exactly where `budget` is; `batch` prompts at a time. Where there is
    a `simulate`, rounds accept that many tokens on average, whatever the model says."""

    tree: TreeConfig | None = None
    budget: BudgetConfig | None = None
    batch: int = 1
    simulate: float | None = None


# Decodes all prompts once in a way (model, prompts, setting, new tokens), and tells what `decode_once` does or more.
Once = Callable[[Model, Sequence[Sequence[int]], Setting, int], dict[str, Any]]


def parse_tree(text: str) -> TreeConfig | None:
    """A tree from `SIZE/DEPTH/TOP-K`, as this package writes it; None from `plain`.

    Raises:
        RequestError: there is no such tree.
    """
    if text == "plain":
        return None
    try:
        size, depth, top_k = (int(part) for part in text.split("/"))
        return TreeConfig(depth, top_k, size)
    except ValueError as error:
        raise RequestError(f"expected a tree as SIZE/DEPTH/TOP-K (60/7/10) or plain; got {text!r}: {error}") from None


def tree_name(tree: TreeConfig | None) -> str:
    """`60/7/10`, or `plain`."""
    return "plain" if tree is None else f"{tree.size}/{tree.depth}/{tree.top_k}"


def take_turns(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Setting],
    new_tokens: int,
    repeats: int,
    ledger: Ledger | None = None,
    once: Once | None = None,
    label: str = "turn",
) -> list[dict[str, dict[str, Any]]]:
    """Every setting decodes all prompts once a turn, greedily; `repeats` turns after one that compiles and warms up.

    Returns a mapping for each turn from names to what `once` tells, by default `decode_once`, with the seconds of the
    first turn's compilation under `compile_s`. Turns that `ledger` has under this `label` are not taken again.
    """
    once = once or decode_once
    turns: list[dict[str, dict[str, Any]]] = []
    compiled: dict[str, float] = {}
    with tqdm(total=(repeats + 1) * len(settings), unit="run", disable=None) as bar:
        for turn in range(repeats):
            row = {}
            for name, setting in settings.items():
                key = f"{label} {turn}, {name}"
                if ledger is None or key not in ledger:
                    bar.set_description(name)
                    if name not in compiled:
                        compiled[name] = once(model, prompts, setting, new_tokens)["compile_s"]
                        bar.update()
                    told = once(model, prompts, setting, new_tokens)
                    told |= {"compile_s": compiled[name]}
                    row[name] = told if ledger is None else ledger.put(key, told)
                else:
                    row[name] = ledger.get(key)
                bar.update()
            turns.append(row)
    return turns


def decode_once(model: Model, prompts: Sequence[Sequence[int]], setting: Setting, new_tokens: int) -> dict[str, Any]:
    """All prompts, `setting.batch` at a time: seconds of decoding, prefill and compilation; tokens after each prompt's
    first; rounds (forward passes); and, means over rounds, what was accepted, wanted, read and kept."""
    batches = [prompts[i : i + setting.batch] for i in range(0, len(prompts), setting.batch)]
    results = [
        model.generate(
            batch, tree=setting.tree, budget=setting.budget, max_new_tokens=new_tokens, ignore_eos=True,
            simulate_accept_length=setting.simulate,
        )
        for batch in batches
    ]  # fmt: skip
    told = [p for result in results for p in result.prompts]
    rounds = np.array([p.rounds for p in told])
    passes = np.array([max(p.rounds for p in result.prompts) for result in results])
    by_depth = sum(np.array(p.accepted_by_depth) * p.rounds for p in told) / max(rounds.sum(), 1)

    def mean(name: str) -> float:
        return float(np.dot(passes, [getattr(r, name) for r in results]) / max(passes.sum(), 1))

    return {
        "decode_s": sum(r.decode_s for r in results),
        "prefill_s": sum(r.prefill_s for r in results),
        "compile_s": sum(r.compile_s for r in results),
        "tokens": sum(p.new_tokens - 1 for p in told),
        "rounds": int(passes.sum()),
        "accept_length": 1.0 + float(np.sum(by_depth)),
        "accepted_by_depth": np.asarray(by_depth).round(4).tolist(),
        **{name: mean(name) for name in ("experts_wanted", "experts_loaded", "mass_kept", "tokens_replaced")},
        "exact": all(r.exact for r in results),
        "simulated": results[0].simulated_accept_length,
        "token_ids": [p.token_ids for p in told],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speed(told: Mapping[str, Any]) -> float:
    """Tokens a second, of decoding alone."""
    return told["tokens"] / told["decode_s"]
