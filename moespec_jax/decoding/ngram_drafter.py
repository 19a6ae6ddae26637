"""Drafting without a network: the newest tokens are looked up in the text so far, and what followed them is drafted.

Every earlier position is compared with the end of the text: the length of its match is the number of tokens, counted
backwards, that agree. The tokens after the positions of the longest matches, the latest first, are merged into a tree.
For "a b c | a b d | a b" with a tree of four nodes after the root b:

            b                  two matches of length 2, of which the later, weighted more, was followed by d
           / \
          d   c
          |   |
          a   a

A continuation that reaches the end of the text repeats from its own beginning, as the text would if it had a period.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams, StatelessDrafter
from moespec_jax.decoding.tree import Level, Tree, prune
from moespec_jax.nn.top_k import top_k

# A continuation's weight grows by the first for every token of its match, and falls by the second for every one of the
# same length that is later.
BY_MATCH, BY_AGE = 4.0, 0.9
# Continuations of a tree for each of its top-k; a chain has one.
CONTINUATIONS = 4
# Log-probability of a node where nothing is left to draft.
ABSENT = -100.0


@dataclasses.dataclass(frozen=True)
class NgramDrafter(StatelessDrafter):
    """Continuations of the newest tokens in prompt and output (`drafter.Drafter`). It has no parameters and no state.

    Fields:
        longest: largest number of newest tokens that are looked up.
    """

    longest: int = 6

    def propose(
        self, tree: TreeConfig, params: SpeculativeParams[Any], state: SpeculationState[tuple[()]]
    ) -> tuple[Tree, SpeculationState[tuple[()]]]:
        """Look up the newest tokens of every sequence, and draft what followed them."""
        draft = jax.vmap(partial(draft_continuations, tree, self.longest))
        return draft(state.decoding.tokens, state.decoding.length), state


def draft_continuations(tree: TreeConfig, longest: int, tokens: Int[Array, " slots"], length: Int[Array, ""]) -> Tree:
    """Draft a tree after the first `length` tokens; later ones are not read.

    The probability of a node is estimated as the share of the continuations' weights that pass through it, times
    m / (m + d) at depth d after a longest match of m tokens. Where fewer tokens are known than the tree has nodes, the
    others are copies of the root.
    """
    count = 1 if tree.top_k == 1 else CONTINUATIONS * tree.top_k
    count = min(max(count, -(-(tree.size - 1) // (tree.depth + 1))), len(tokens))
    matches = match_lengths(longest, tokens, length)
    # Exact in float32: contexts have far fewer than 2**24 / longest tokens.
    slots = jnp.arange(len(tokens), dtype=jnp.int32)
    best = top_k((matches * len(tokens) + slots).astype(jnp.float32), count)[1]
    match = matches[best]
    period = jnp.maximum(length - 1 - best, 1)
    steps = jnp.arange(tree.depth + 1, dtype=jnp.int32)
    followed = tokens[best[:, None] + 1 + steps[None, :] % period[:, None]]
    root = tokens[length - 1]
    return _merged(tree, root, followed, match)


def match_lengths(longest: int, tokens: Int[Array, " slots"], length: Int[Array, ""]) -> Int[Array, " slots"]:
    """Count how many of the newest tokens, up to `longest`, precede the end of the text up to each position; 0 from the
    newest token on."""
    slots = jnp.arange(len(tokens), dtype=jnp.int32)
    alike, count = slots < length - 1, jnp.zeros_like(slots)
    for back in range(min(longest, len(tokens))):
        newest = tokens[jnp.maximum(length - 1 - back, 0)]
        alike = alike & (slots >= back) & (jnp.roll(tokens, back) == newest)
        count = count + alike.astype(jnp.int32)
    return count


def _merged(
    tree: TreeConfig,
    root: Int[Array, ""],
    followed: Int[Array, "continuations levels"],
    match: Int[Array, " continuations"],
) -> Tree:
    """Merge continuations, best first, into a tree; those of a match of 0 tokens are none."""
    count = len(match)
    number, levels = jnp.arange(count, dtype=jnp.int32), jnp.arange(tree.depth + 1, dtype=jnp.int32)
    alike = _equal_prefixes(followed, match > 0)
    shorter, later = (match[0] - match).astype(jnp.float32), number.astype(jnp.float32)
    weight = jnp.where(match > 0, BY_MATCH**-shorter * BY_AGE**later, 0.0)
    share = jnp.sum(jnp.where(alike, weight[None, None, :], 0.0), axis=2) / jnp.maximum(jnp.sum(weight), 1.0)
    # The node of a prefix is that of the first continuation that has it.
    first = jnp.argmax(alike, axis=2).astype(jnp.int32)
    is_node = (first == number[None, :]) & (match > 0)[None, :]
    longest = match[0].astype(jnp.float32)
    survival = longest / (longest + 1 + levels.astype(jnp.float32))
    scores = jnp.where(is_node, jnp.log(jnp.where(is_node, share * survival[:, None], 1.0)), ABSENT)
    above = jnp.concatenate([jnp.full_like(first[:1], -1), first[:-1] + count * levels[:-1, None]])
    pool = Level(followed.T, scores, jnp.where(is_node, above, -1))
    found = prune(tree, root, jax.tree.map(lambda part: part[0], pool), jax.tree.map(lambda part: part[1:], pool))
    absent = found.scores == ABSENT
    return found._replace(tokens=jnp.where(absent, root, found.tokens), parents=jnp.where(absent, -1, found.parents))


def _equal_prefixes(
    followed: Int[Array, "continuations levels"], valid: Bool[Array, " continuations"]
) -> Bool[Array, "levels continuations continuations"]:
    """Mark which continuations have equal tokens up to each level."""
    equal = followed.T[:, :, None] == followed.T[:, None, :]
    both = valid[:, None] & valid[None, :]
    return jnp.cumprod(equal & both[None], axis=0, dtype=jnp.int32) > 0
