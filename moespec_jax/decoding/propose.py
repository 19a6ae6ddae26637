"""Drafting: the head extends its cache with true features, then grows a tree level by level (EAGLE-2, arXiv:2406.16858,
section 3; EAGLE-3, arXiv:2503.01840). The whole batch at once; every sequence has a tree of its own.

While the tree grows, its rows lie in the draft cache behind the confirmed pairs: row `i * top_k + s` is beam node s of
level i. The next extension writes over them, for they came from guessed features.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import DraftConfig, TreeConfig
from moespec_jax.decoding.tree import Beam, Level, Tree, first_level, next_level, prune
from moespec_jax.nn.attention import causal_mask, tree_mask
from moespec_jax.nn.cache import Cache, in_rows
from moespec_jax.nn.eagle3 import DraftHead, draft_forward, draft_logits, fuse_taps, next_features


def extend_draft(
    config: DraftConfig,
    head: DraftHead,
    embed: Float[Array, "vocab model"],
    taps: Float[Array, "batch pairs aux"],
    following: Int[Array, "batch pairs"],
    cache: Cache,
) -> tuple[Float[Array, "batch pairs model"], Cache]:
    """Run the head on new pairs: the target's states of tokens from position `cache.length[b]` on, each beside the
    token after it. Rows past the last true pair are padding: whatever sees their slots later writes them first."""
    embed = embed if head.embed is None else head.embed
    positions = cache.length[:, None] + jnp.arange(following.shape[1], dtype=jnp.int32)[None, :]
    mask = causal_mask(positions, cache.slots)
    return draft_forward(config, head, embed[following], fuse_taps(config, head, taps), positions, mask, cache)


def propose_trees(
    config: DraftConfig,
    tree: TreeConfig,
    head: DraftHead,
    embed: Float[Array, "vocab model"],
    outputs: Float[Array, "batch model"],
    roots: Int[Array, " batch"],
    cache: Cache,
) -> tuple[Tree, Cache]:
    """A tree for every sequence. `outputs` are the head's at the last confirmed pair; `cache` holds all those pairs.

    The cache comes back with the same length and the tree's rows behind it.
    """
    embed = embed if head.embed is None else head.embed
    confirmed, k = cache.length, tree.top_k

    def log_probabilities(outputs: Array) -> Array:
        return jax.nn.log_softmax(draft_logits(config, head, outputs), axis=-1)

    def grow(carry: tuple[Cache, Beam, Array], level: Array) -> tuple[tuple[Cache, Beam, Array], Level]:
        cache, beam, features = carry
        positions = jnp.broadcast_to((confirmed + level)[:, None], beam.tokens.shape)
        mask = tree_mask(beam.ancestors, confirmed, cache.slots)
        cache = dataclasses.replace(cache, length=confirmed + level * k)
        outputs, cache = draft_forward(config, head, embed[beam.tokens], features, positions, mask, cache)
        cache = dataclasses.replace(cache, k=jax.tree.map(in_rows, cache.k), v=jax.tree.map(in_rows, cache.v))
        candidates, beam = jax.vmap(lambda b, lp: next_level(tree, level, b, lp, head.target_ids))(
            beam, log_probabilities(outputs)
        )
        features = jnp.take_along_axis(next_features(config, head, outputs), beam.parents[:, :, None], axis=1)
        return (cache, beam, features), candidates

    first, beam = jax.vmap(lambda lp: first_level(tree, lp, head.target_ids))(log_probabilities(outputs))
    features = jnp.broadcast_to(
        next_features(config, head, outputs)[:, None, :], (*beam.tokens.shape, outputs.shape[-1])
    )
    (cache, _, _), levels = jax.lax.scan(grow, (cache, beam, features), jnp.arange(tree.depth, dtype=jnp.int32))
    trees = jax.vmap(lambda root, first, levels: prune(tree, root, first, levels), in_axes=(0, 0, 1))(
        roots, first, levels
    )
    return trees, dataclasses.replace(cache, length=confirmed)
