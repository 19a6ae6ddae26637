"""Rules that choose a round's shape, replayed over recorded drafts with a table of costs (`auto_replay.py`).

A rule decodes one text: it returns the milliseconds of its rounds by the table, and the rounds of each shape. The
product's own is `decoding/choice.py` as it is. Beside it are two published ones, in plain Python from their
descriptions, and the least time that any choice can reach.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.choice import Choice, after_round, first_choice


@dataclasses.dataclass(frozen=True)
class Table:
    """Milliseconds of rounds, measured on a device.

    Fields:
        name: model, device and budget.
        source: where and when they were measured.
        plain: of a plain round.
        rounds: of a round of each tree.
        drafts: of the draft alone, of each tree.
    """

    name: str
    source: str
    plain: float
    rounds: dict[TreeConfig, float]
    drafts: dict[TreeConfig, float]

    @property
    def trees(self) -> list[TreeConfig]:
        """Trees of the menu."""
        return list(self.rounds)

    @property
    def costs(self) -> list[float]:
        """Costs of a round of every shape, plain decoding first."""
        return [self.plain, *self.rounds.values()]

    def at_width(self, tree: TreeConfig, width: int) -> float:
        """Milliseconds of a round that drafts the whole tree and verifies `width` of its nodes: interpolated between
        the measured verifications, in the logarithm of the width."""
        verified = {1: self.plain} | {t.size: cost - self.drafts[t] for t, cost in self.rounds.items()}
        widths = sorted(verified)
        verify = np.interp(np.log(width), np.log(widths), [verified[w] for w in widths])
        return self.drafts[tree] + float(verify)


class Drafts(NamedTuple):
    """Drafts of one tree at every position of one text.

    Fields:
        ranks: [positions, depths] rank of the text's node of each depth among the tree's drafted nodes, best path
            first; larger than all where the tree does not have it.
        log_probabilities: [positions, nodes] of the drafted nodes' paths, best first.
    """

    ranks: np.ndarray
    log_probabilities: np.ndarray

    def gained(self, width: int) -> np.ndarray:
        """Tokens that a round gains at each position, if the best `width` nodes are verified, the root included."""
        return 1 + (self.ranks < width - 1).sum(axis=1)


class Decoded(NamedTuple):
    """A text decoded by a rule.

    Fields:
        ms: milliseconds of all rounds.
        rounds: number of rounds of each shape.
    """

    ms: float
    rounds: dict[str, int]


# Table, and the drafts of each of its trees -> the text decoded.
Rule = Callable[[Table, Sequence[Drafts]], Decoded]


def fixed(shape: int, table: Table, drafts: Sequence[Drafts]) -> Decoded:
    """Every round has one shape; 0 is plain decoding."""
    return _walk(table, _gains(table, drafts), lambda position: shape)


def chosen(priors: Sequence[float], table: Table, drafts: Sequence[Drafts]) -> Decoded:
    """Choose by `decoding/choice.py`, with `priors` as the gains that were measured with the costs."""
    gains = _gains(table, drafts)
    costs, expected = (np.asarray(values, np.float32) for values in (table.costs, priors))
    rounds = np.asarray(_decode(len(priors))(jnp.asarray(gains, jnp.float32), costs, expected))
    return Decoded(float(rounds @ table.costs), _named(table, rounds))


def least(table: Table, drafts: Sequence[Drafts]) -> Decoded:
    """The least time of any sequence of shapes, by dynamic programming from the end of the text."""
    gains = _gains(table, drafts)
    steps, best = gains.shape[1], np.zeros(gains.shape[1], int)
    left = np.zeros(steps + int(gains.max()) + 1)
    for position in reversed(range(steps)):
        options = [cost + left[position + g] for cost, g in zip(table.costs, gains[:, position], strict=True)]
        best[position] = int(np.argmin(options))
        left[position] = min(options)
    return _walk(table, gains, lambda position: best[position])


def evict(tree: int, table: Table, drafts: Sequence[Drafts]) -> Decoded:
    """EVICT (arXiv:2605.00342): every round drafts the tree, and verifies the prefix of its nodes, best path first, for
    which the sum of path probabilities over the profiled cost is largest."""
    shape, own = table.trees[tree], drafts[tree]
    widths = np.arange(1, shape.size + 1)
    costs = np.array([table.at_width(shape, int(width)) for width in widths])
    expected = _expected(own)
    width = widths[np.argmax(expected / costs, axis=1)]
    return _walk_widths(table, shape, own, lambda position, before: int(width[position]))


def confidence_scheduled(tree: int, table: Table, drafts: Sequence[Drafts]) -> Decoded:
    """vLLM's confidence-scheduled verification (pull request 47808; the planner as in TensorRT-LLM's 17056) for one
    sequence: a chain is drafted whole, the survival of a token is the product of confidences, and the number of
    verified tokens maximises expected tokens over cost. It is set from the confidences of two rounds before."""
    shape, own = table.trees[tree], drafts[tree]
    costs = np.array([table.at_width(shape, width) for width in range(1, shape.size + 1)])
    expected = _expected(own)

    def width(position: int, before: list[int]) -> int:
        known = before[-2] if len(before) >= 2 else None
        return shape.size if known is None else 1 + int(np.argmax(expected[known] / costs))

    return _walk_widths(table, shape, own, width)


def _expected(own: Drafts) -> np.ndarray:
    """Tokens that are expected of each width at each position by the path probabilities, [positions, nodes]."""
    return 1 + np.pad(np.exp(own.log_probabilities), ((0, 0), (1, 0))).cumsum(axis=1)


def _gains(table: Table, drafts: Sequence[Drafts]) -> np.ndarray:
    """Tokens that a round of each shape gains at each position, [shapes, positions]."""
    trees = [own.gained(tree.size) for tree, own in zip(table.trees, drafts, strict=True)]
    return np.stack([np.ones_like(trees[0]), *trees])


def _walk(table: Table, gains: np.ndarray, shape: Callable[[int], int]) -> Decoded:
    position, rounds = 0, np.zeros(len(gains), int)
    while position < gains.shape[1]:
        chosen_shape = shape(position)
        rounds[chosen_shape] += 1
        position += int(gains[chosen_shape, position])
    return Decoded(float(rounds @ table.costs), _named(table, rounds))


def _walk_widths(table: Table, tree: TreeConfig, own: Drafts, width: Callable[[int, list[int]], int]) -> Decoded:
    """Decode with one tree of which each round verifies `width(position, earlier positions)` nodes."""
    position, before, ms, rounds = 0, [], 0.0, {}
    while position < len(own.ranks):
        nodes = width(position, before)
        ms += table.at_width(tree, nodes)
        rounds[str(nodes)] = rounds.get(str(nodes), 0) + 1
        before.append(position)
        position += 1 + int((own.ranks[position] < nodes - 1).sum())
    return Decoded(ms, rounds)


def _named(table: Table, rounds: np.ndarray) -> dict[str, int]:
    return dict(zip(["plain", *(tree.name for tree in table.trees)], rounds.tolist(), strict=True))


@cache
def _decode(shapes: int) -> Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]:
    """Compile the rounds of one text for a number of shapes: (gains, costs, priors) -> rounds of each shape."""
    after = [partial(after_round, shape=shape) for shape in range(shapes)]

    def run(gains: jax.Array, costs: np.ndarray, priors: np.ndarray) -> jax.Array:
        steps = gains.shape[1]

        def one(state: tuple[Choice, jax.Array, jax.Array]) -> tuple[Choice, jax.Array, jax.Array]:
            choice, position, rounds = state
            shape = choice.current
            tokens = gains[shape, position]
            follow = [lambda c, t, a=a: a(c, tokens=t) for a in after]
            choice = jax.lax.switch(shape, follow, choice, tokens)
            return choice, position + tokens.astype(jnp.int32), rounds.at[shape].add(1)

        start = (first_choice(jnp.asarray(costs), jnp.asarray(priors)), jnp.int32(0), jnp.zeros(shapes, jnp.int32))
        return jax.lax.while_loop(lambda state: state[1] < steps, one, start)[2]

    return jax.jit(run)
