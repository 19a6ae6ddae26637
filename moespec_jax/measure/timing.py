"""Timing of decoding methods in turns: every method on the same prompts in one process, so that ratios are fair."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.measure.ledger import Ledger
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.requested_sampling import GREEDY
from moespec_jax.runtime.results import RunResult, rounds_by_shape


class TimingCase(NamedTuple):
    """A decoding spec, and the number of prompts in a batch."""

    spec: DecodingSpec = DecodingSpec()
    batch: int = 1


# Decode all prompts once: (model, prompts, case, new tokens) -> the stats of `decode_once`, or more.
DecodeOnce = Callable[[Model, Sequence[Sequence[int]], TimingCase, int], dict[str, Any]]


def parse_tree(text: str) -> TreeConfig | None:
    """Parse a tree from `SIZE/DEPTH/TOP-K`, as `TreeConfig.name` writes it; None from `plain`.

    Raises:
        RequestError: the tree is invalid.
    """
    if text == "plain":
        return None
    try:
        return TreeConfig.of_name(text)
    except ValueError as error:
        raise RequestError(f"expected a tree as SIZE/DEPTH/TOP-K (60/7/10) or plain; got {text!r}: {error}") from None


def time_interleaved(
    model: Model,
    prompts: Sequence[Sequence[int]],
    cases: Mapping[str, TimingCase],
    new_tokens: int,
    repeats: int,
    ledger: Ledger | None = None,
    once: DecodeOnce | None = None,
    label: str = "turn",
) -> list[dict[str, dict[str, Any]]]:
    """Decode all prompts greedily in every case once a turn, for `repeats` turns after one that compiles and warms up.

    Args:
        model: target and draft head.
        prompts: token ids.
        cases: by name.
        new_tokens: number of new tokens for each prompt.
        repeats: number of turns.
        ledger: turns that it contains under `label` are not measured again.
        once: measurement of one case, `decode_once` by default.
        label: distinguishes sets of prompts in the ledger.

    Returns:
        For each turn a mapping from names to the stats of `once`; `compile_s` is the compilation of the first turn.
    """
    once = once or decode_once
    turns: list[dict[str, dict[str, Any]]] = []
    compiled: dict[str, float] = {}
    with tqdm(total=(repeats + 1) * len(cases), unit="run", disable=None) as bar:
        for turn in range(repeats):
            row = {}
            for name, case in cases.items():
                key = f"{label} {turn}, {name}"
                if ledger is None or key not in ledger:
                    bar.set_description(name)
                    if name not in compiled:
                        compiled[name] = once(model, prompts, case, new_tokens)["compile_s"]
                        bar.update()
                    stats = once(model, prompts, case, new_tokens)
                    stats |= {"compile_s": compiled[name]}
                    row[name] = stats if ledger is None else ledger.put(key, stats)
                else:
                    row[name] = ledger.get(key)
                bar.update()
            turns.append(row)
    return turns


def decode_once(model: Model, prompts: Sequence[Sequence[int]], case: TimingCase, new_tokens: int) -> dict[str, Any]:
    """Decode all prompts, `case.batch` at a time.

    Returns:
        Seconds of decoding, prefill and compilation; `tokens`, those after the first of each prompt; `rounds`, the
        target's forward passes; means over rounds of tokens gained and experts; `token_ids`; and `choice`, None unless
        every round chooses its shape.
    """
    batches = [prompts[i : i + case.batch] for i in range(0, len(prompts), case.batch)]
    spec = case.spec
    results = [
        model.generate(
            batch, tree=spec.tree, budget=spec.budget, max_new_tokens=new_tokens, ignore_eos=True,
            simulate_accept_length=spec.simulate_accept_length, **GREEDY,
        )
        for batch in batches
    ]  # fmt: skip
    sequences = [p for result in results for p in result.prompts]
    rounds = np.array([p.rounds for p in sequences])
    passes = np.array([max(p.rounds for p in result.prompts) for result in results])
    by_depth = sum(np.array(p.accepted_by_depth) * p.rounds for p in sequences) / max(rounds.sum(), 1)

    def mean(name: str) -> float:
        return float(np.dot(passes, [getattr(r, name) for r in results]) / max(passes.sum(), 1))

    return {
        "decode_s": sum(r.decode_s for r in results),
        "prefill_s": sum(r.prefill_s for r in results),
        "compile_s": sum(r.compile_s for r in results),
        "tokens": sum(p.new_tokens - 1 for p in sequences),
        "rounds": int(passes.sum()),
        "accept_length": 1.0 + float(np.sum(by_depth)),
        "accepted_by_depth": np.asarray(by_depth).round(4).tolist(),
        **{name: mean(name) for name in ("experts_wanted", "experts_read", "mass_kept", "tokens_replaced")},
        "exact": all(r.exact for r in results),
        "simulated": results[0].simulated_accept_length,
        "token_ids": [p.token_ids for p in sequences],
        "choice": _choice(results),
    }


def _choice(results: Sequence[RunResult]) -> dict[str, Any] | None:
    """Share of rounds by shape, and seconds by the costs over measured ones; None where no round chooses."""
    choices = [(result.choice, result.decode_s) for result in results if result.choice is not None]
    if not choices:
        return None
    rounds = rounds_by_shape([choice for choice, _ in choices])
    known = [(choice["predicted_s"], seconds) for choice, seconds in choices if choice["predicted_s"] is not None]
    return {
        "share_of_rounds": {name: count / max(sum(rounds.values()), 1) for name, count in rounds.items()},
        "predicted_over_measured": sum(p for p, _ in known) / sum(s for _, s in known) if known else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Compute median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def tokens_per_second(stats: Mapping[str, Any]) -> float:
    """Compute tokens per second of decoding, without prefill and compilation."""
    return stats["tokens"] / stats["decode_s"]
