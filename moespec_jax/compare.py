"""Speculative against plain decoding of the same prompts, interleaved in one process."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Literal

from moespec_jax.config import TreeConfig
from moespec_jax.results import RunResult

REPEATS = 5


@dataclasses.dataclass
class Comparison:
    """Tokens per second of both ways and their ratio: median, and over `repeats` the lowest and highest. `same_tokens`
    is the share of tokens up to the first that differs; None where tokens are drawn, and differ by right."""

    repeats: int
    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    speed_up: float
    speed_up_min: float
    speed_up_max: float
    same_tokens: float | None


def compare(
    generate: Callable[..., RunResult], tree: TreeConfig | Literal["default"], repeats: int = REPEATS
) -> Comparison:
    """Decode both ways in turn; the first turn warms up and does not count."""
    pairs = []
    for _ in range(repeats + 1):
        plain = generate(tree=None, simulate_accept_length=None)
        pairs.append((plain, generate(tree=tree)))
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in pairs[1:] if a.tokens_per_s]
    return Comparison(
        repeats=repeats,
        plain_tokens_per_s=statistics.median(a.tokens_per_s for a, _ in pairs[1:]),
        speculative_tokens_per_s=statistics.median(b.tokens_per_s for _, b in pairs[1:]),
        speed_up=statistics.median(ratios) if ratios else 0.0,
        speed_up_min=min(ratios, default=0.0),
        speed_up_max=max(ratios, default=0.0),
        same_tokens=_agreement(*pairs[-1]) if pairs[-1][1].greedy and pairs[-1][1].exact else None,
    )


def _agreement(plain: RunResult, speculative: RunResult) -> float:
    same = total = 0
    for a, b in zip(plain.prompts, speculative.prompts, strict=True):
        total += len(a.token_ids)
        differ = [i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y]
        same += differ[0] if differ else min(len(a.token_ids), len(b.token_ids))
    return same / total
