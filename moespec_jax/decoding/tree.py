r"""The draft tree of one sequence, in arrays of static shape: grown level by level, then pruned to its best nodes.

EAGLE-2's dynamic tree (arXiv:2406.16858), which EAGLE-3 (arXiv:2503.01840) keeps: a beam of `top_k` nodes is expanded
`depth` times; every child enters the pool, the best children are the next beam, and the best of the pool are the tree.
All functions are deterministic; callers `vmap` over the batch.

The pool is ordered by level, then by beam node, then by child, best first. The score of a node is the log-probability
of its path: s(node) = s(parent) + log q(token | parent). Since log q <= 0 and ties go to the lower index, the parent of
every chosen node is chosen too.

A tree of five nodes, its parents, and the attention mask of `ancestors` (row i attends to column j):

            0 root           node     0  1  2  3  4         1 . . . .
           / \               parent  -1  0  0  1  1         1 1 . . .
          1   2                                             1 . 1 . .
         / \                                                1 1 . 1 .
        3   4                                               1 1 . . 1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import TreeConfig


class Tree(NamedTuple):
    """The `TreeConfig.size` tokens to verify: the root, then drafted nodes in the pool's order.

    Fields:
        tokens: the target's token ids; siblings differ.
        parents: node indices; a parent precedes its children. -1 for the root, and for copies of it that fill a tree
            whose drafter has nothing more to draft: they read no other experts than it, and are never accepted.
        scores: log-probability of the path from the root, float32, 0 for the root.
    """

    tokens: Int[Array, "*batch nodes"]
    parents: Int[Array, "*batch nodes"]
    scores: Float[Array, "*batch nodes"]


class Level(NamedTuple):
    """Candidates that one expansion adds to the pool.

    Fields:
        tokens: the target's token ids.
        scores: log-probability of the path from the root.
        parents_flat: indices in the pool, -1 for the root.
    """

    tokens: Int[Array, "*levels candidates"]
    scores: Float[Array, "*levels candidates"]
    parents_flat: Int[Array, "*levels candidates"]


class Beam(NamedTuple):
    """Nodes that the next pass of the drafter expands. Row i of the beam of level l is written to scratch slot
    `l * top_k + i` of the drafter's cache.

    Fields:
        tokens: the target's token ids.
        scores: log-probability of the path from the root.
        parents: rows of the previous beam, whose outputs are the input features; 0 in the first beam, whose parent is
            the root.
        flat: indices in the pool.
        ancestors: scratch slots that a node attends to: its path from the root, itself included.
    """

    tokens: Int[Array, " beam"]
    scores: Float[Array, " beam"]
    parents: Int[Array, " beam"]
    flat: Int[Array, " beam"]
    ancestors: Bool[Array, "beam drafted"]


def check_draft_vocabulary(config: TreeConfig, draft_vocab_size: int) -> None:
    """Check that a node has no more children than the head has tokens.

    Raises:
        ValueError: it has more.
    """
    if draft_vocab_size < config.top_k:
        raise ValueError(
            f"expected a tree of top-k at most {draft_vocab_size}, the size of the draft head's vocabulary;"
            f" got {config.top_k}"
        )


def first_level(
    config: TreeConfig,
    scores: Float[Array, " beam"],
    ids: Int[Array, " beam"],
    target_ids: Int[Array, " draft_vocab"],
) -> tuple[Level, Beam]:
    """Take the root's `top_k` best children, which are the first beam.

    `scores` and `ids` are the log-probabilities and the ids of the drafter's most probable tokens after the last
    confirmed pair (`top_k.most_probable`); `target_ids` maps them to different tokens of the target.
    """
    slots = jnp.arange(config.top_k, dtype=jnp.int32)
    beam = Beam(
        tokens=target_ids[ids].astype(jnp.int32),
        scores=scores,
        parents=jnp.zeros_like(slots),
        flat=slots,
        ancestors=_own_slot(config, jnp.int32(0)),
    )
    return Level(beam.tokens, beam.scores, jnp.full_like(slots, -1)), beam


def next_level(
    config: TreeConfig,
    level_index: Int[Array, ""],
    beam: Beam,
    gains: Float[Array, "beam children"],
    ids: Int[Array, "beam children"],
    target_ids: Int[Array, " draft_vocab"],
) -> tuple[Level, Beam]:
    """Take the `top_k` best children of every beam node, and the best of them as the next beam.

    `level_index` counts expansions from 0 and may be traced. `gains` and `ids` are the log-probabilities and the ids
    of the most probable children of each node of the beam, in the drafter's vocabulary. The beam of the last expansion
    is not expanded and has no scratch slots.
    """
    k = config.top_k
    tokens = target_ids[ids].astype(jnp.int32).reshape(k * k)
    scores = (beam.scores[:, None] + gains).reshape(k * k)
    level = Level(tokens, scores, jnp.repeat(beam.flat, k))
    best_scores, best = jax.lax.top_k(scores, k)
    parents = best // k
    start = k + level_index * k**2
    ancestors = beam.ancestors[parents] | _own_slot(config, level_index + 1)
    return level, Beam(tokens[best], best_scores, parents, start + best, ancestors)


def prune(config: TreeConfig, root_token: Int[Array, ""], first: Level, rest: Level) -> Tree:
    """Prune the pool to its best `size - 1` candidates. `rest` is stacked `[depth, top_k**2]`."""
    tokens, scores, parents_flat = (
        jnp.concatenate([a, b.reshape(-1)]) for a, b in zip(first, rest, strict=True)
    )  # [pool]
    chosen = jnp.sort(jax.lax.top_k(scores, config.size - 1)[1])
    above = parents_flat[chosen]
    # Node 0 is the root, so that chosen[i] is node i + 1.
    found = jnp.searchsorted(chosen, above, method="compare_all").astype(jnp.int32) + 1
    return Tree(
        tokens=jnp.concatenate([root_token[None].astype(jnp.int32), tokens[chosen]]),
        parents=jnp.concatenate([jnp.full((1,), -1, jnp.int32), jnp.where(above < 0, 0, found)]),
        scores=jnp.concatenate([jnp.zeros((1,), jnp.float32), scores[chosen]]),
    )


def ancestors(parents: Int[Array, " nodes"]) -> Bool[Array, "nodes nodes"]:
    """Compute the tree's attention mask: row i marks the path from the root to node i, itself included.

    A node of parent -1 attends to itself alone.
    """
    size = parents.shape[0]
    slots = jnp.arange(size, dtype=jnp.int32)
    reach = (parents[:, None] == slots[None, :]) | (slots[:, None] == slots[None, :])
    # Each squaring doubles the length of the paths; none has more than size - 1 steps.
    for _ in range((size - 1).bit_length()):
        steps = reach.astype(jnp.float32)
        reach = steps @ steps > 0
    return reach


def depths(mask: Bool[Array, "nodes nodes"]) -> Int[Array, " nodes"]:
    """Count the steps from the root to each node, given `ancestors`."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1


def _own_slot(config: TreeConfig, level_index: Int[Array, ""]) -> Bool[Array, "beam drafted"]:
    """Mark the scratch slot of each node of a level's beam."""
    slots = jnp.arange(config.depth * config.top_k, dtype=jnp.int32)
    own = level_index * config.top_k + jnp.arange(config.top_k, dtype=jnp.int32)
    return slots[None, :] == own[:, None]
