"""Drafting with the target itself, whose tokens use fewer experts than they should. Attention and everything else are
the target's, and so is the cache, in which the drafted rows follow the committed ones until verification overwrites
them.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.config import DecoderConfig, TreeConfig
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams, StatelessDrafter
from moespec_jax.decoding.sampling import batch_noise
from moespec_jax.decoding.tree import Beam, Level, Tree, first_level, next_level, prune
from moespec_jax.nn.attention import causal_mask, tree_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import Cache, row_major_cache
from moespec_jax.nn.decoder import forward, shard_logits
from moespec_jax.nn.top_k import most_probable_of_shards
from moespec_jax.parallel.collectives import own_shard

State = SpeculationState[tuple[()]]


@dataclasses.dataclass(frozen=True)
class SelfDrafter(StatelessDrafter):
    """Chains and dynamic trees of a target that routes every token to its `experts` best experts (`drafter.Drafter`).

    Fields:
        config: the target's settings.
        backend: the target's back-end.
        experts: number of experts of a drafted token, weighted as the target's settings weigh so many.
    """

    config: DecoderConfig
    backend: Backend
    experts: int = 1

    def propose(self, tree: TreeConfig, params: SpeculativeParams[Any], state: State) -> tuple[Tree, State]:
        """Read the root, then grow a tree level by level, as `eagle3_drafter.grow_trees` does with a head."""
        decoding, k = state.decoding, tree.top_k
        ids = jnp.arange(params.target.embed.shape[0], dtype=jnp.int32)
        roots, positions = decoding.newest, decoding.length[:, None] - 1
        mask = causal_mask(positions, decoding.cache.slots)
        cache = dataclasses.replace(decoding.cache, length=decoding.length - 1)
        best, cache = self._children(k, params, state, roots, positions, mask, cache)
        first, beam = jax.vmap(lambda gains, child: first_level(tree, gains[0], child[0], ids))(*best)

        def grow(carry: tuple[Cache, Beam], level: Array) -> tuple[tuple[Cache, Beam], Level]:
            cache, beam = carry
            positions = jnp.broadcast_to((decoding.length + level)[:, None], beam.tokens.shape)
            mask = tree_mask(beam.ancestors, decoding.length, cache.slots)
            cache = dataclasses.replace(cache, length=decoding.length + level * k)
            best, cache = self._children(k, params, state, beam.tokens, positions, mask, cache)
            candidates, beam = jax.vmap(lambda b, gain, child: next_level(tree, level, b, gain, child, ids))(
                beam, *best
            )
            return (cache, beam), candidates

        levels = jnp.arange(tree.depth, dtype=jnp.int32)
        (cache, _), rest = jax.lax.scan(grow, (cache, beam), levels)
        trees = jax.vmap(partial(prune, tree), in_axes=(0, 0, 1))(roots[:, 0], first, rest)
        cache = dataclasses.replace(cache, length=decoding.cache.length)
        return trees, dataclasses.replace(state, decoding=dataclasses.replace(decoding, cache=cache))

    def _children(
        self,
        count: int,
        params: SpeculativeParams[Any],
        state: State,
        tokens: Int[Array, "batch beam"],
        positions: Int[Array, "batch beam"],
        mask: Bool[Array, "batch beam slots"],
        cache: Cache,
    ) -> tuple[tuple[Float[Array, "batch beam children"], Int[Array, "batch beam children"]], Cache]:
        """Read tokens into the cache from slot `cache.length[b]` on; returns log-probabilities and ids of the `count`
        most probable tokens after each. Where tokens are sampled, with the noise of their draws."""
        hidden, cache, _ = forward(  # pyright: ignore[reportAssignmentType]
            dataclasses.replace(self.config, num_experts_per_tok=self.experts),
            params.target,
            tokens,
            positions,
            mask,
            cache,
            self.backend,
            valid=jnp.broadcast_to(~state.decoding.done[:, None], tokens.shape),
            rope_length=positions + 1,
        )
        cache = row_major_cache(cache)
        logits, sampling = shard_logits(params.target, hidden), state.sampling
        axes = params.target.sharding.vocabulary
        if not sampling.greedy:
            # Nodes of one level share the noise of their position.
            noise = batch_noise(state.decoding.key, positions[:, :1] + 1, len(params.target.embed))
            logits = logits / sampling.temperature + own_shard(noise, axes)
        return most_probable_of_shards(self.backend.most_probable, logits, count, axes), cache
