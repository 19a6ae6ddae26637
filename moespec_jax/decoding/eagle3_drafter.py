"""Drafting with an EAGLE-3 head (arXiv:2503.01840): the head reads the pairs that the last round confirmed, then grows
a tree level by level (EAGLE-2, arXiv:2406.16858, section 3). Where tokens are sampled, the head's logits take the noise
of the target's draws: a token that noise favours at a position is drafted there, too, and accepted more often.

The whole batch drafts at once; every sequence has a tree of its own. While a tree grows, its rows are in the head's
cache behind the confirmed pairs: row `i * top_k + s` is beam node s of level i. The next round overwrites them, since
they were computed from the head's own features, not from the target's.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import DraftConfig, TreeConfig
from moespec_jax.decoding.autoregressive import row_at
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.sampling import batch_noise
from moespec_jax.decoding.tree import Beam, Level, Tree, check_draft_vocabulary, first_level, next_level, prune
from moespec_jax.decoding.waiting import HeadDrafter, HeadState
from moespec_jax.nn.attention import causal_mask, tree_mask
from moespec_jax.nn.backend import PLAIN, Backend
from moespec_jax.nn.cache import Cache, empty_cache, row_major_cache
from moespec_jax.nn.eagle3 import DraftHead, draft_forward, draft_logits, fuse_aux, next_features
from moespec_jax.nn.top_k import most_probable_of_shards
from moespec_jax.parallel.collectives import own_shard

Params = SpeculativeParams[DraftHead]


@dataclasses.dataclass(frozen=True)
class Eagle3Drafter(HeadDrafter):
    """Dynamic trees or chains of an EAGLE-3 head (`drafter.Drafter`). The rows of its cache are pairs: pair t is token
    t with the one after.

    Fields:
        config: the head's settings.
        backend: forms of attention, of the projection before it, and of the choice of tokens.
    """

    config: DraftConfig
    backend: Backend = PLAIN

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Hidden states of the target that the head reads."""
        return self.config.boundaries

    def init(self, params: Params, batch: int, slots: int) -> HeadState:
        """Allocate an empty cache."""
        dtype = params.draft.fc.dtype
        cache = empty_cache(self.config, batch, slots, dtype, stacked=False)
        aux = jnp.zeros((batch, 1, self.config.aux_size), dtype)
        return HeadState(cache, aux, jnp.zeros((batch,), jnp.int32))

    def read(
        self,
        params: Params,
        state: HeadState,
        next_tokens: Int[Array, "batch chunk"],
        aux_hidden_states: Float[Array, "batch chunk aux"] | None,
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
    ) -> HeadState:
        """Read the pairs of one chunk. The pair of a prompt's last token waits for the first draw."""
        assert aux_hidden_states is not None
        cache = dataclasses.replace(state.cache, length=jnp.broadcast_to(start, prompt_lengths.shape))
        _, cache = extend_cache(self.config, params, aux_hidden_states, next_tokens, cache, self.backend)
        last = row_at(aux_hidden_states, prompt_lengths - 1 - start, state.aux[:, 0])
        return HeadState(cache, last[:, None, :], state.skipped)

    def begin(self, tree: TreeConfig, state: HeadState, prompt_lengths: Int[Array, " batch"]) -> HeadState:
        """Confirm all pairs of the prompt but its last token's."""
        batch, _, width = state.aux.shape
        padding = jnp.zeros((batch, tree.longest_path - 1, width), state.aux.dtype)
        cache = dataclasses.replace(state.cache, length=prompt_lengths - 1)
        return HeadState(cache, jnp.concatenate([state.aux, padding], axis=1), state.skipped)

    def propose(
        self, tree: TreeConfig, params: Params, state: SpeculationState[HeadState]
    ) -> tuple[Tree, SpeculationState[HeadState]]:
        """Read the pairs that the last round confirmed, and grow a tree from the last of them."""
        decoding, draft, width = state.decoding, state.draft, state.draft.aux.shape[1]
        confirmed, skipped = draft.cache.length, draft.skipped
        next_positions = (confirmed + skipped)[:, None] + 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
        next_tokens = jnp.take_along_axis(decoding.tokens, next_positions, axis=1)
        outputs, cache = extend_cache(self.config, params, draft.aux, next_tokens, draft.cache, self.backend, skipped)
        pairs = decoding.length - 1 - skipped  # one for every token but the root
        last = jnp.clip(pairs - 1 - confirmed, 0, width - 1)
        outputs = jnp.take_along_axis(outputs, last[:, None, None], axis=1)[:, 0]
        roots = decoding.newest[:, 0]
        cache = dataclasses.replace(cache, length=pairs)
        logits = partial(draw_logits, self.config, params, state)
        trees, cache = grow_trees(self.config, tree, params, outputs, roots, cache, skipped, logits, self.backend)
        return trees, dataclasses.replace(state, draft=HeadState(cache, draft.aux, skipped))


def extend_cache(
    config: DraftConfig,
    params: Params,
    aux: Float[Array, "batch pairs aux"],
    next_tokens: Int[Array, "batch pairs"],
    cache: Cache,
    backend: Backend = PLAIN,
    skipped: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch pairs model"], Cache]:
    """Run the head on new pairs: the target's hidden states of the tokens from position `cache.length[b]` on, or
    `skipped[b]` later, each with the token after it. Rows behind the last true pair are padding, which later passes
    overwrite before they read it."""
    embed = _embedding(params)
    slots = cache.length[:, None] + jnp.arange(next_tokens.shape[1], dtype=jnp.int32)[None, :]
    mask = causal_mask(slots, cache.slots)
    positions = slots if skipped is None else slots + skipped[:, None]
    features = fuse_aux(config, params.draft, aux)
    return draft_forward(config, params.draft, embed[next_tokens], features, positions, mask, cache, backend)


def grow_trees(
    config: DraftConfig,
    tree: TreeConfig,
    params: Params,
    outputs: Float[Array, "batch model"],
    roots: Int[Array, " batch"],
    cache: Cache,
    skipped: Int[Array, " batch"],
    logits: Callable[[Array, Array], Array],
    backend: Backend = PLAIN,
) -> tuple[Tree, Cache]:
    """Draft a tree for every sequence.

    Args:
        config: the head's settings.
        tree: shape of the trees.
        params: target, whose embedding the head may share, and head.
        outputs: the head's outputs at the last confirmed pair.
        roots: the newest token of each sequence.
        cache: all confirmed pairs.
        skipped: number of pairs that it lacks.
        logits: of the tokens `level` places after the root's next, from the outputs before them; on a mesh, over this
            device's shard of the draft vocabulary.
        backend: forms of the head's attention, of the choice of tokens and of the loop over levels.

    Returns:
        The trees, and the cache with unchanged lengths and the trees' rows behind the confirmed ones.
    """
    head, embed, confirmed, k = params.draft, _embedding(params), cache.length, tree.top_k
    ids = head.target_ids
    assert ids is not None  # only a head in training has none
    check_draft_vocabulary(tree, len(ids))

    def children(outputs: Array, level: Array) -> tuple[Array, Array]:
        return most_probable_of_shards(backend.most_probable, logits(outputs, level), k, head.sharding.vocabulary)

    def first_children(scores: Array, children: Array) -> tuple[Level, Beam]:
        return first_level(tree, scores, children, ids)

    def grow(carry: tuple[Cache, Beam, Array], level: Array) -> tuple[tuple[Cache, Beam, Array], Level]:
        cache, beam, features = carry
        positions = jnp.broadcast_to((confirmed + skipped + level)[:, None], beam.tokens.shape)
        mask = tree_mask(beam.ancestors, confirmed, cache.slots)
        cache = dataclasses.replace(cache, length=confirmed + level * k)
        outputs, cache = draft_forward(config, head, embed[beam.tokens], features, positions, mask, cache, backend)
        cache = row_major_cache(cache)
        best = children(outputs, level + 1)
        candidates, beam = jax.vmap(lambda b, gain, child: next_level(tree, level, b, gain, child, ids))(beam, *best)
        features = jnp.take_along_axis(next_features(config, head, outputs), beam.parents[:, :, None], axis=1)
        return (cache, beam, features), candidates

    first, beam = jax.vmap(first_children)(*children(outputs, jnp.int32(0)))
    features = next_features(config, head, outputs)[:, None, :]
    features = jnp.broadcast_to(features, (*beam.tokens.shape, outputs.shape[-1]))
    levels = jnp.arange(tree.depth, dtype=jnp.int32)
    (cache, _, _), rest = jax.lax.scan(grow, (cache, beam, features), levels, unroll=backend.unrolled)
    trees = jax.vmap(partial(prune, tree), in_axes=(0, 0, 1))(roots, first, rest)
    return trees, dataclasses.replace(cache, length=confirmed)


def draw_logits(
    config: DraftConfig,
    params: Params,
    state: SpeculationState[HeadState],
    outputs: Float[Array, "batch *beam model"],
    level: Int[Array, ""],
) -> Float[Array, "batch *beam draft_vocab_shard"]:
    """Compute the head's logits of the token that the target draws `level` places after the root's next.

    Where tokens are sampled, they are given the noise of that draw. Top-k and top-p are the target's alone, so that
    every node of a tree has children.
    """
    logits, decoding, sampling = draft_logits(config, params.draft, outputs), state.decoding, state.sampling
    ids = params.draft.target_ids
    if not sampling.greedy:
        assert ids is not None  # only a head in training has none
        positions, vocab_size = (decoding.length + level)[:, None], params.target.embed.shape[0]
        noise = batch_noise(decoding.key, positions, vocab_size)[:, 0, own_shard(ids, params.draft.sharding.vocabulary)]
        logits = logits / sampling.temperature + jnp.expand_dims(noise, tuple(range(1, logits.ndim - 1)))
    return logits


def _embedding(params: Params) -> Float[Array, "vocab model"]:
    """The head's own embedding, or else the target's."""
    return params.target.embed if params.draft.embed is None else params.draft.embed
