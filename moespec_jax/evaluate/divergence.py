"""Divergence of every spec from the exact target over texts; each set and spec is a task of a ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from moespec_jax.config import TreeConfig
from moespec_jax.evaluate.specs import EvaluatedSpec
from moespec_jax.evaluate.texts import TextSet
from moespec_jax.measure.fidelity import DRAWS, Texts, interval
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.teacher_forcing import ForcedStats
from moespec_jax.runtime.model import Model


def measure(model: Model, sets: Sequence[TextSet], specs: Sequence[EvaluatedSpec], batch: int, ledger: Ledger) -> None:
    """Teacher-force all texts under every speculative spec, `batch` at a time; the ledger receives sums by text."""
    drafting = [evaluated for evaluated in specs if evaluated.spec.tree is not None]
    with tqdm(total=len(sets) * len(drafting), desc="texts", unit="spec", disable=not (sets and drafting)) as bar:
        for texts in sets:
            prefilled: Texts | None = None
            for evaluated in drafting:
                if task_name(texts, evaluated) not in ledger:
                    tree, size = evaluated.spec.tree, min(batch, len(texts.texts))
                    assert isinstance(tree, TreeConfig)
                    prefilled = prefilled or Texts(model, tree, texts.texts, texts.given, size)
                    stats = prefilled.teacher_force(evaluated.spec.budget)
                    ledger.put(task_name(texts, evaluated), by_text(stats))
                bar.update()


def task_name(texts: TextSet, evaluated: EvaluatedSpec) -> str:
    """Name in the ledger of a set of texts under one spec."""
    return f"{texts.name}, {texts.kind}, {evaluated.name}"


def by_text(stats: ForcedStats) -> dict[str, list[Any]]:
    """Sum the stats of each text: divergence, equal first choices and negative log-likelihood over its positions.

    The remaining fields of `ForcedStats` are sums over rounds already.
    """
    sums = {
        "positions": np.isfinite(stats.kl).sum(axis=1),
        "kl": np.nansum(stats.kl, axis=1, dtype=np.float64),
        "same": np.nansum(stats.same, axis=1, dtype=np.float64),
        "nll": -np.nansum(stats.log_probability, axis=1, dtype=np.float64),
        **{name: getattr(stats, name) for name in ("rounds", "committed", "wanted", "read", "replaced")},
    }
    return {name: np.asarray(values).tolist() for name, values in sums.items()}


def text_columns(sums: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """Columns of a row from the sums of `by_text`, with 95 % bootstrap intervals over texts.

    Divergence and equal first choices are means over texts of the means of each text; perplexity and bits per byte are
    ratios of sums over all texts. `sizes` are the scored bytes of each text, 0 where unknown.
    """
    stats = {name: np.asarray(values, np.float64) for name, values in sums.items()}
    rounds, positions = stats["rounds"].sum(), stats["positions"]
    found: dict[str, Any] = {"texts": len(positions), "positions": int(positions.sum()), "rounds": int(rounds)}
    found |= distribution_columns(stats, sizes)
    by_depth = stats["committed"].sum(axis=0) / rounds
    return found | {
        "accept_length": round(1 + float(by_depth.sum()), 3),
        "accepted_by_depth": by_depth.round(4).tolist(),
        "experts_wanted": round(float(stats["wanted"].sum() / rounds), 2),
        "experts_read": round(float(stats["read"].sum() / rounds), 2),
        "tokens_replaced": round(float(stats["replaced"].sum() / rounds), 4),
    }


def distribution_columns(stats: Mapping[str, np.ndarray], sizes: Sequence[int]) -> dict[str, Any]:
    """Columns about distributions alone: divergence, equal first choices, perplexity, and bits per byte."""
    positions, found = stats["positions"], dict[str, Any]()
    for name, key in {"kl": "kl", "top1": "same"}.items():
        means = stats[key] / positions
        found |= {name: round(float(means.mean()), 6), f"{name}_95": interval(means)}
        found[f"{name}_by_text"] = means.round(6).tolist()
    mean, low, high = ratio(stats["nll"], positions)
    found |= {"perplexity": _rounded(np.exp(mean)), "perplexity_95": [_rounded(np.exp(x)) for x in (low, high)]}
    found["bits_per_byte"] = found["bits_per_byte_95"] = None
    if all(sizes):
        mean, low, high = ratio(stats["nll"] / np.log(2), np.asarray(sizes, np.float64))
        found |= {"bits_per_byte": _rounded(mean), "bits_per_byte_95": [_rounded(low), _rounded(high)]}
    return found | {"nll_by_text": (stats["nll"] / positions).round(6).tolist()}


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Compute a ratio of sums over texts, and the bounds of its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(0, len(above), (DRAWS, len(above)))
    low, high = np.percentile(above[drawn].sum(axis=1) / below[drawn].sum(axis=1), [2.5, 97.5])
    return float(above.sum() / below.sum()), float(low), float(high)


def _rounded(value: float) -> float:
    return round(float(value), 5)
