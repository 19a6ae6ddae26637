"""Acceptance length of all trees at once, from one pass of drafting over given texts.

A greedy target accepts the path of a tree that its own continuation takes. Where the continuation is given, acceptance
needs no verification: at every position the whole pool of a width (`TreeConfig.top_k`) is drafted, and the nodes of the
continuation are located in it. A tree of depth d and size n consists of the root and the n - 1 best nodes of the pool's
first d + 1 levels, so a node is in the tree if its rank among those is below n - 1. Rounds are then replayed from
position to position, as in decoding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.state_specs import BY_SEQUENCE
from moespec_jax.decoding.tree import Tree
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.measure.fidelity import with_texts
from moespec_jax.measure.plain_pass import plain_pass
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.parallel.processes import fetch
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

# Rank of a node that is not in the pool.
ABSENT = np.iinfo(np.int32).max
_GREEDY = SamplingConfig()

# Pytree of what is kept of every tree.
Read = TypeVar("Read")


class Acceptance(NamedTuple):
    """Acceptance of one tree.

    Fields:
        accept_length: mean number of tokens that a round gains.
        accepted_by_depth: share of rounds that accept a node at depth 1, 2, ...
    """

    accept_length: float
    accepted_by_depth: list[float]


def whole_pool(depth: int, top_k: int) -> TreeConfig:
    """Build the tree that contains its whole pool."""
    return TreeConfig(depth, top_k, TreeConfig(depth, top_k, 2).pool + 1)


def path_ranks(
    model: Model, texts: Sequence[Sequence[int]], prompts: Sequence[int], depth: int, top_k: int, steps: int
) -> np.ndarray:
    """Rank the nodes of each text's continuation in the pools drafted at `steps` of its positions.

    Args:
        model: target and draft head.
        texts: token ids, each at least `prompts[i] + steps + depth + 1` long.
        prompts: lengths of the prompts; the root of the first position is the token after the prompt.
        depth: of the deepest tree.
        top_k: width of all trees.
        steps: number of positions of each text.

    Returns:
        int32 [texts, steps, levels, depths]: rank of the node at depth `level + 1` in the pool of a tree of depth 0, 1,
        ...; `ABSENT` where the pool does not contain the continuation.
    """
    tree = whole_pool(depth, top_k)
    return np.asarray(drafts_along(model, texts, prompts, tree, steps, partial(_path_ranks, tree)))


def drafts_along(
    model: Model,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[int],
    tree: TreeConfig,
    steps: int,
    read: Callable[[Tree, Array, Array], Read],
    sampling: SamplingConfig = _GREEDY,
) -> Read:
    """Draft a tree at `steps` positions of each text, from the end of its prompt on, as a round there would.

    Args:
        model: target and draft head.
        texts: token ids, each at least `prompts[i] + steps + 1` long.
        prompts: lengths of the prompts; the root of the first position is the token after the prompt.
        tree: shape of the trees.
        steps: number of positions of each text.
        read: what to keep of a tree, given a text's tokens and the number of them up to the tree's root.
        sampling: how the texts were drawn, with seed 0 and as one batch.

    Returns:
        Pytree of `read`, with leading axes [texts, steps].
    """
    method = model.speculative(DecodingSpec(tree), sampling)
    params = model.speculative_params
    begun = [list(text[:prompt]) for text, prompt in zip(texts, prompts, strict=True)]
    programs, longest = model.programs, max(map(len, texts))
    run = Run(programs, method, params, Batch(begun, [len(text) for text in texts], (), 0))
    state = with_texts(programs, run.state_after(0), texts, prompts)
    by_text: Any = BY_SEQUENCE
    found = programs.run(_along, _Along(method, read, steps, longest), params, state, specs=by_text)
    return jax.tree.map(lambda values: fetch(values)[: len(texts)], found)


def replay(ranks: np.ndarray, tree: TreeConfig) -> Acceptance:
    """Replay the rounds of one tree over all texts, each from the position where the one before ended."""
    levels = tree.depth + 1
    accepted = (ranks[:, :, :levels, tree.depth] < tree.size - 1).sum(axis=2)
    steps, counts = ranks.shape[1], np.zeros(levels + 1, np.int64)
    for text in accepted:
        position = 0
        while position < steps:
            counts[text[position]] += 1
            position += 1 + int(text[position])
    reached = counts[::-1].cumsum()[::-1] / counts.sum()
    longest = tree.longest_path
    return Acceptance(float(reached[1:].sum()) + 1.0, reached[1:longest].tolist())


class _Along(NamedTuple):
    """Settings of `_along`: as in `drafts_along`, and the length of the longest text."""

    method: Speculative[DraftHead, HeadState]
    read: Callable[[Tree, Array, Array], Any]
    steps: int
    longest: int


def _along(settings: _Along, params: SpeculativeParams[DraftHead], state: SpeculationState[HeadState]) -> Any:
    method, read, steps, longest = settings
    aux = _exact_aux(method.target, method.drafter.boundaries, params.target, state.decoding.tokens[:, :longest])
    start = state.decoding.length

    def draft(cache: Cache, step: Array) -> tuple[Cache, Any]:
        length = start + step
        row = jnp.take_along_axis(aux, (length - 2)[:, None, None], axis=1)
        padded = jnp.concatenate([row, jnp.zeros_like(state.draft.aux[:, 1:])], axis=1)
        decoding = dataclasses.replace(state.decoding, length=length)
        before = dataclasses.replace(state, decoding=decoding, draft=HeadState(cache, padded, state.draft.skipped))
        trees, after = method.propose(params, before)
        return after.draft.cache, jax.vmap(read)(trees, state.decoding.tokens, length)

    _, kept = jax.lax.scan(draft, state.draft.cache, jnp.arange(steps, dtype=jnp.int32))
    return jax.tree.map(lambda values: jnp.swapaxes(values, 0, 1), kept)


def _exact_aux(
    plain: Autoregressive, boundaries: tuple[int, ...], target: Decoder, texts: Int[Array, "texts tokens"]
) -> Float[Array, "texts tokens aux"]:
    """Compute every token's auxiliary hidden states in one plain pass of the target."""
    _, info = plain_pass(plain.config, plain.backend, target, texts, boundaries=boundaries)
    assert info.aux_hidden_states is not None
    return info.aux_hidden_states


def _path_ranks(
    tree: TreeConfig, pool: Tree, text: Int[Array, " tokens"], length: Int[Array, ""]
) -> Int[Array, "levels depths"]:
    """Rank the nodes that a text takes in a whole pool whose root is the text's token at `length - 1`."""
    levels, k = tree.depth + 1, tree.top_k
    level = jnp.concatenate([jnp.zeros((k,), jnp.int32), 1 + jnp.arange(tree.depth * k**2, dtype=jnp.int32) // k**2])
    tokens, scores = pool.tokens[1:], pool.scores[1:]
    # By score, ties by the lower index in the pool, as the nodes of a tree are chosen.
    order = jnp.argsort(-scores, stable=True)
    within = level[None, order] <= jnp.arange(levels, dtype=jnp.int32)[:, None]
    rank = jnp.zeros_like(within, jnp.int32).at[:, order].set(jnp.cumsum(within, axis=1, dtype=jnp.int32) - 1)

    def step(node: Array, depth: Array) -> tuple[Array, Array]:
        child = (pool.parents[1:] == node) & (tokens == text[length + depth]) & (level == depth)
        found, index = jnp.any(child), jnp.argmax(child).astype(jnp.int32)
        deep_enough = jnp.arange(levels, dtype=jnp.int32) >= depth
        return jnp.where(found, index + 1, -2), jnp.where(found & deep_enough, rank[:, index], ABSENT)

    return jax.lax.scan(step, jnp.int32(0), jnp.arange(levels, dtype=jnp.int32))[1]
