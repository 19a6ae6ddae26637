"""How far ways of decoding are from the exact target along texts, piece by piece into a ledger."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from moespec_jax.evaluate.texts import TextSet
from moespec_jax.evaluate.ways import Way
from moespec_jax.measure.fidelity import DRAWS, Texts, interval
from moespec_jax.measure.ledger import Ledger
from moespec_jax.measure.teacher_forcing import Followed
from moespec_jax.runtime.model import Model


def measure(model: Model, sets: Sequence[TextSet], ways: Sequence[Way], batch: int, ledger: Ledger) -> None:
    """Follow every text in every way that drafts a tree, `batch` at a time; each set and way is a piece."""
    drafting = [way for way in ways if way.tree is not None]
    with tqdm(total=len(sets) * len(drafting), desc="texts", unit="way", disable=not sets) as bar:
        for texts in sets:
            begun: Texts | None = None
            for way in drafting:
                if piece_name(texts, way) not in ledger:
                    assert way.tree is not None
                    begun = begun or Texts(model, way.tree, texts.texts, texts.given, min(batch, len(texts.texts)))
                    ledger.put(piece_name(texts, way), by_text(begun.follow(way.budget)))
                bar.update()


def piece_name(texts: TextSet, way: Way) -> str:
    """What the ledger calls a set of texts followed in one way."""
    return f"{texts.name}, {texts.kind}, {way.name}"


def by_text(followed: Followed) -> dict[str, list[Any]]:
    """Figures of each text: sums over its positions of divergence, equal first choices and negative log-likelihood, and
    what `Followed` sums over its rounds."""
    sums = {
        "positions": np.isfinite(followed.kl).sum(axis=1),
        "kl": np.nansum(followed.kl, axis=1, dtype=np.float64),
        "same": np.nansum(followed.same, axis=1, dtype=np.float64),
        "nll": -np.nansum(followed.log_probability, axis=1, dtype=np.float64),
        **{name: getattr(followed, name) for name in ("rounds", "committed", "wanted", "read", "replaced")},
    }
    return {name: np.asarray(values).tolist() for name, values in sums.items()}


def figures(piece: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """One row's figures, from a piece: means over texts of their own means, ratios of sums over texts, and for each
    95 % of a bootstrap over texts; `sizes` are the bytes that were followed of each text, 0 where they are not known.
    """
    told = {name: np.asarray(values, np.float64) for name, values in piece.items()}
    rounds, positions = told["rounds"].sum(), told["positions"]
    found: dict[str, Any] = {"texts": len(positions), "positions": int(positions.sum()), "rounds": int(rounds)}
    for name, key in {"kl": "kl", "top1": "same"}.items():
        means = told[key] / positions
        found |= {name: round(float(means.mean()), 6), f"{name}_95": interval(means)}
        found[f"{name}_by_text"] = means.round(6).tolist()
    mean, low, high = ratio(told["nll"], positions)
    found |= {"perplexity": _rounded(np.exp(mean)), "perplexity_95": [_rounded(np.exp(x)) for x in (low, high)]}
    found["bits_per_byte"] = found["bits_per_byte_95"] = None
    if all(sizes):
        mean, low, high = ratio(told["nll"] / np.log(2), np.asarray(sizes, np.float64))
        found |= {"bits_per_byte": _rounded(mean), "bits_per_byte_95": [_rounded(low), _rounded(high)]}
    found["nll_by_text"] = (told["nll"] / positions).round(6).tolist()
    by_depth = told["committed"].sum(axis=0) / rounds
    return found | {
        "accept_length": round(1 + float(by_depth.sum()), 3),
        "accepted_by_depth": by_depth.round(4).tolist(),
        "experts_wanted": round(float(told["wanted"].sum() / rounds), 2),
        "experts_read": round(float(told["read"].sum() / rounds), 2),
        "tokens_replaced": round(float(told["replaced"].sum() / rounds), 4),
    }


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Sum over sum, with the bounds of 95 % of a bootstrap that draws texts."""
    drawn = np.random.default_rng(0).integers(0, len(above), (DRAWS, len(above)))
    low, high = np.percentile(above[drawn].sum(axis=1) / below[drawn].sum(axis=1), [2.5, 97.5])
    return float(above.sum() / below.sum()), float(low), float(high)


def _rounded(value: float) -> float:
    return round(float(value), 5)
