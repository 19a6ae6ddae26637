"""Drafts by n-grams in plain Python: dictionaries of prefixes, and no arrays."""

from collections.abc import Sequence

Prefix = tuple[int, ...]


def match_length(text: Sequence[int], position: int, longest: int) -> int:
    """Number of tokens that agree, counted backwards from `position` and from the end of the text."""
    count = 0
    while count < longest and position - count >= 0 and text[position - count] == text[-1 - count]:
        count += 1
    return count


def after(text: Sequence[int], position: int, steps: int) -> list[int]:
    """The tokens after a position, which go on from there again where the text ends."""
    known = list(text[position + 1 :])
    return [known[step % len(known)] for step in range(steps)]


def nodes(text: Sequence[int], longest: int, depth: int, continuations: int) -> dict[Prefix, float]:
    """Every path from the root that continuations take, with its probability."""
    matches = [(match_length(text, p, longest), p) for p in range(len(text) - 1)]
    best = sorted((found for found in matches if found[0]), reverse=True)[:continuations]
    weights = [4.0 ** (match - best[0][0]) * 0.9**age for age, (match, _) in enumerate(best)]
    found: dict[Prefix, float] = {}
    for weight, (_, position) in zip(weights, best, strict=True):
        path = after(text, position, depth + 1)
        for d in range(1, depth + 2):
            survival = best[0][0] / (best[0][0] + d)
            found[tuple(path[:d])] = found.get(tuple(path[:d]), 0.0) + weight / sum(weights) * survival
    return found
