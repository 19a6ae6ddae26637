"""Drafting with a DFlash or DSpark head: every round, the head reads the target's hidden states of the tokens that the
last round committed, then drafts a chain of tokens in one pass over a block (`nn/dflash.py`).

Where tokens are sampled, the logits take the noise of the target's draws, as an EAGLE-3 head's do. A DSpark head draws
one token of the chain after another, but only the product that depends on the token before is sequential. Where it
estimates acceptance, the products of its estimates are the path probabilities of the tree.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.sampling import batch_noise
from moespec_jax.decoding.tree import Tree
from moespec_jax.decoding.waiting import HeadDrafter, HeadState
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.backend import PLAIN, Backend
from moespec_jax.nn.cache import Cache, empty_cache
from moespec_jax.nn.dflash import (
    DFlashHead,
    block_forward,
    block_logits,
    extend_context,
    fuse_context,
    log_confidence,
    markov_step,
)
from moespec_jax.nn.top_k import most_probable_of_shards
from moespec_jax.parallel.collectives import own_shard

Params = SpeculativeParams[DFlashHead]


@dataclasses.dataclass(frozen=True)
class DFlashDrafter(HeadDrafter):
    """Chains of a DFlash or DSpark head (`drafter.Drafter`); of a block, a shorter chain takes the first tokens. The
    rows of its cache are the context.

    Fields:
        config: the head's settings.
        backend: forms of attention, of the projection before it, and of the choice of tokens.
    """

    config: DFlashConfig
    backend: Backend = PLAIN

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Hidden states of the target that the head reads."""
        return self.config.boundaries

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.config.block_size

    def init(self, params: Params, batch: int, slots: int) -> HeadState:
        """Allocate an empty context."""
        dtype = params.draft.fc.dtype
        cache = empty_cache(self.config, batch, slots, dtype, stacked=False)
        return HeadState(cache, jnp.zeros((batch, 1, self.config.aux_size), dtype), jnp.zeros((batch,), jnp.int32))

    def read(
        self,
        params: Params,
        state: HeadState,
        next_tokens: Int[Array, "batch chunk"],
        aux_hidden_states: Float[Array, "batch chunk aux"] | None,
        start: Int[Array, ""],
        prompt_lengths: Int[Array, " batch"],
    ) -> HeadState:
        """Read the hidden states of one chunk; rows behind a prompt's end are padding, which later passes overwrite."""
        assert aux_hidden_states is not None
        cache = dataclasses.replace(state.cache, length=jnp.broadcast_to(start, prompt_lengths.shape))
        cache = self._extend(params, aux_hidden_states, cache, state.skipped)
        return dataclasses.replace(state, cache=cache)

    def begin(self, tree: TreeConfig, state: HeadState, prompt_lengths: Int[Array, " batch"]) -> HeadState:
        """Confirm all tokens of the prompt; none waits."""
        batch, _, width = state.aux.shape
        aux = jnp.zeros((batch, tree.longest_path, width), state.aux.dtype)
        # An array of its own: a state is donated, and no array may be in it twice.
        cache = dataclasses.replace(state.cache, length=prompt_lengths + 0)
        return HeadState(cache, aux, state.skipped)

    def propose(
        self, tree: TreeConfig, params: Params, state: SpeculationState[HeadState]
    ) -> tuple[Tree, SpeculationState[HeadState]]:
        """Read the tokens that the last round committed, and draft the chain that follows the root.

        Raises:
            ValueError: the tree is no chain, or longer than the block (when traced).
        """
        config, head = self.config, params.draft
        config.check_chain(tree)
        decoding, draft = state.decoding, state.draft
        cache = self._extend(params, draft.aux, draft.cache, draft.skipped)
        cache = dataclasses.replace(cache, length=decoding.length - 1 - draft.skipped)
        roots = decoding.newest
        masks = jnp.full((len(roots), config.block_size - 1), config.mask_token_id, jnp.int32)
        embed = params.target.embed if head.embed is None else head.embed
        rows = jnp.arange(config.block_size, dtype=jnp.int32)[None, :]
        embedded = embed[jnp.concatenate([roots, masks], axis=1)]
        hidden, cache = block_forward(config, head, embedded, decoding.length[:, None] - 1 + rows, cache, self.backend)
        first = 0 if config.sample_from_anchor else 1
        chain, gains = self._draw(params, state, hidden[:, first : first + tree.size - 1], roots[:, 0])
        scores = jnp.pad(jnp.cumsum(gains, axis=1), ((0, 0), (1, 0)))
        parents = jnp.broadcast_to(jnp.arange(-1, tree.size - 1, dtype=jnp.int32)[None, :], scores.shape)
        trees = Tree(jnp.concatenate([roots, chain], axis=1), parents, scores)
        return trees, dataclasses.replace(state, draft=dataclasses.replace(draft, cache=cache))

    def _extend(self, params: Params, aux: Array, cache: Cache, skipped: Array) -> Cache:
        """Write the context rows of hidden states from slot `cache.length[b]` on; rows behind the last true one are
        padding."""
        slots = cache.length[:, None] + jnp.arange(aux.shape[1], dtype=jnp.int32)[None, :]
        features = fuse_context(self.config, params.draft, aux)
        return extend_context(self.config, params.draft, features, slots + skipped[:, None], cache)

    def _draw(
        self, params: Params, state: SpeculationState[HeadState], hidden: Array, roots: Array
    ) -> tuple[Int[Array, "batch drafted"], Float[Array, "batch drafted"]]:
        """Choose the tokens of a chain, and their conditional log-probabilities, from the rows that draft them."""
        config, head, ids = self.config, params.draft, params.draft.target_ids
        assert ids is not None  # only a head in training has none
        axes = head.sharding.vocabulary
        logits, scale = _noised_logits(params, state, block_logits(head, hidden)), _inverse_temperature(state)
        if head.markov is None:
            found = most_probable_of_shards(self.backend.most_probable, logits, 1, axes)
            gains, best = (part[..., 0] for part in found)
            chain = ids[best]
        else:
            markov = dataclasses.replace(head.markov, following=own_shard(head.markov.following, axes, axis=0))

            def step(carry: tuple[Array, Array], row: tuple[Array, Array]) -> tuple[tuple[Array, Array], Any]:
                recurrent, before = carry
                bias, recurrent = markov_step(config, markov, recurrent, before, row[1])
                gain, best = most_probable_of_shards(self.backend.most_probable, row[0] + bias * scale, 1, axes)
                token = ids[best[:, 0]]
                return (recurrent, token), (token, gain[:, 0])

            start = jnp.zeros((len(roots), config.markov_rank), markov.previous.dtype), roots
            rows = logits.swapaxes(0, 1), hidden.swapaxes(0, 1)
            drawn = jax.lax.scan(step, start, rows, unroll=self.backend.unrolled)[1]
            chain, gains = (part.swapaxes(0, 1) for part in drawn)
        if head.confidence is not None:
            before = jnp.concatenate([roots[:, None], chain[:, :-1]], axis=1)
            gains = log_confidence(config, head, before, hidden)
        return chain, gains


def _inverse_temperature(state: SpeculationState[HeadState]) -> float:
    return 1.0 if state.sampling.greedy else 1.0 / state.sampling.temperature


def _noised_logits(
    params: Params, state: SpeculationState[HeadState], logits: Float[Array, "batch drafted draft_vocab_shard"]
) -> Float[Array, "batch drafted draft_vocab_shard"]:
    """Divide logits by the temperature and give them the noise of the target's draws, where tokens are sampled."""
    decoding, ids = state.decoding, params.draft.target_ids
    if state.sampling.greedy:
        return logits
    assert ids is not None  # only a head in training has none
    positions = decoding.length[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    noise = batch_noise(decoding.key, positions, params.target.embed.shape[0])
    return logits * _inverse_temperature(state) + noise[..., own_shard(ids, params.draft.sharding.vocabulary)]
