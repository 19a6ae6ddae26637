"""The draft tree of one sequence in fixed slots: grown level by level, then cut to its best nodes.

EAGLE-2's dynamic tree (arXiv:2406.16858), which EAGLE-3 (arXiv:2503.01840) keeps: a beam of `top_k` nodes is expanded
`depth` times; every child enters the pool, the best of them are the next beam, and the best of the pool are the tree.
Everything is static in shape and deterministic; callers `vmap` over the batch.

The pool's flat order is the first level, then each level's children, beam node by beam node, best child first. A score
is the sum of log-probabilities on the way from the root. Since none of them is above 0 and equal scores go to the lower
flat index, whichever node is chosen, its parent is chosen too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import TreeConfig


class Tree(NamedTuple):
    """The `TreeConfig.size` tokens to verify: the root, then drafted nodes in the pool's order.

    `tokens` are the target's ids. `parents` are node indices, -1 for the root; a parent precedes its children, and
    siblings, best first, differ in their tokens. `scores` are float32, 0 for the root.
    """

    tokens: Int[Array, " nodes"]
    parents: Int[Array, " nodes"]
    scores: Float[Array, " nodes"]


class Level(NamedTuple):
    """The candidates that one expansion adds to the pool, in flat order; stacked `[levels, candidates]` over levels.

    `parents_flat` are flat indices in the pool, -1 for the root.
    """

    tokens: Int[Array, "*levels candidates"]
    scores: Float[Array, "*levels candidates"]
    parents_flat: Int[Array, "*levels candidates"]


class Beam(NamedTuple):
    """The nodes that the next draft forward expands.

    `tokens` are the target's ids; `flat` says where in the pool a node is. `parents` are rows of the previous beam,
    whose outputs are the input features; all 0 in the first beam, whose parent is the root. Row i of the beam of level
    l is written to slot `l * top_k + i` of the draft cache's scratch; `ancestors` says which slots a node may see:
    those on its way from the root, itself included.
    """

    tokens: Int[Array, " beam"]
    scores: Float[Array, " beam"]
    parents: Int[Array, " beam"]
    flat: Int[Array, " beam"]
    ancestors: Bool[Array, "beam drafted"]


def check_draft_vocabulary(config: TreeConfig, draft_vocab_size: int) -> None:
    """A node can have no more children than the head knows tokens.

    Raises:
        ValueError: the tree wants more.
    """
    if draft_vocab_size < config.top_k:
        raise ValueError(
            f"expected a tree of top-k at most {draft_vocab_size}, the number of tokens that the draft head knows;"
            f" got {config.top_k}"
        )


def first_level(
    config: TreeConfig, log_probs: Float[Array, " draft_vocab"], target_ids: Int[Array, " draft_vocab"]
) -> tuple[Level, Beam]:
    """The root's `top_k` best children, which are all of the first beam.

    `log_probs` are the float32 `log_softmax` of the draft's raw logits after the last confirmed pair; `target_ids` maps
    the draft's tokens to the target's, no two to the same.
    """
    check_draft_vocabulary(config, log_probs.shape[0])
    scores, ids = _best(log_probs, config.top_k)
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
    log_probs: Float[Array, "beam draft_vocab"],
    target_ids: Int[Array, " draft_vocab"],
) -> tuple[Level, Beam]:
    """The `top_k` best children of every beam node, and the best of them as the next beam.

    Expansions are counted by `level_index` from 0, and may be a scan's: all shapes are the same. `log_probs` follow the
    beam's tokens. The beam that the last expansion leaves is not drafted and has no slot of its own.
    """
    k = config.top_k
    gains, ids = jax.vmap(lambda row: _best(row, k))(log_probs)
    tokens = target_ids[ids].astype(jnp.int32).reshape(k * k)
    scores = (beam.scores[:, None] + gains).reshape(k * k)
    level = Level(tokens, scores, jnp.repeat(beam.flat, k))
    best_scores, best = jax.lax.top_k(scores, k)
    parents = best // k
    start = k + level_index * k**2
    ancestors = beam.ancestors[parents] | _own_slot(config, level_index + 1)
    return level, Beam(tokens[best], best_scores, parents, start + best, ancestors)


def prune(config: TreeConfig, root_token: Int[Array, ""], first: Level, rest: Level) -> Tree:
    """The best `size - 1` candidates of the pool as a tree. `rest` is stacked `[depth, top_k**2]`."""
    tokens, scores, parents_flat = (
        jnp.concatenate([a, b.reshape(-1)]) for a, b in zip(first, rest, strict=True)
    )  # [pool]
    chosen = jnp.sort(jax.lax.top_k(scores, config.size - 1)[1])
    above = parents_flat[chosen]
    # Node 0 is the root, and so chosen[i] is node i + 1.
    found = jnp.searchsorted(chosen, above, method="compare_all").astype(jnp.int32) + 1
    return Tree(
        tokens=jnp.concatenate([root_token[None].astype(jnp.int32), tokens[chosen]]),
        parents=jnp.concatenate([jnp.full((1,), -1, jnp.int32), jnp.where(above < 0, 0, found)]),
        scores=jnp.concatenate([jnp.zeros((1,), jnp.float32), scores[chosen]]),
    )


def ancestors(parents: Int[Array, " nodes"]) -> Bool[Array, "nodes nodes"]:
    """Row i marks the nodes on the way from the root to node i, itself included: the tree's attention mask.

    Derived from `parents` alone; a slot of parent -1 sees itself.
    """
    size = parents.shape[0]
    slots = jnp.arange(size, dtype=jnp.int32)
    reach = (parents[:, None] == slots[None, :]) | (slots[:, None] == slots[None, :])
    # Each squaring doubles how far a row looks; no node is more than size - 1 steps from its root.
    for _ in range((size - 1).bit_length()):
        steps = reach.astype(jnp.float32)
        reach = steps @ steps > 0
    return reach


def depths(mask: Bool[Array, "nodes nodes"]) -> Int[Array, " nodes"]:
    """How many steps each node is from its root, given `ancestors`."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1


def _best(log_probs: Float[Array, " draft_vocab"], k: int) -> tuple[Float[Array, " k"], Int[Array, " k"]]:
    """The k largest, the lower index first among equals. A logarithm may round to above 0 or to -0, which `top_k` ranks
    below 0: either would let a child overtake its parent."""
    return jax.lax.top_k(jnp.where(log_probs < 0, log_probs, 0.0), k)


def _own_slot(config: TreeConfig, level_index: Int[Array, ""]) -> Bool[Array, "beam drafted"]:
    """The slot where each node of a level's beam is drafted."""
    slots = jnp.arange(config.depth * config.top_k, dtype=jnp.int32)
    own = level_index * config.top_k + jnp.arange(config.top_k, dtype=jnp.int32)
    return slots[None, :] == own[:, None]
