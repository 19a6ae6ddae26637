"""Verification of one sequence's draft tree: the path that the target accepts, and the token it adds after it.

The tree is a deterministic function of the text so far, so each proposal is a point mass, and recursive rejection
(SpecInfer, arXiv:2305.09781) comes to this: one coin a node against the running sum of the target's probabilities of
its children. What is emitted is distributed exactly as without a draft. Callers `vmap` over the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.sampling import SamplingConfig, log_probabilities
from moespec_jax.decoding.tree import Tree, ancestors, depths


@struct.dataclass
class Accepted:
    """What a round gives: the tokens of `path` after the root, then `bonus`.

    `path` holds node indices, the root first, `TreeConfig.longest_path` of them; from `count` on it repeats the last
    accepted node. `count` includes the root, and so is also the number of tokens gained.
    """

    path: Int[Array, " path"]
    count: Int[Array, ""]
    bonus: Int[Array, ""]


# (tree, logits [nodes, vocab], the sequence's own key, the position of the first token after the root) -> Accepted
Accept = Callable[[Tree, Array, Array, Array], Accepted]


def accept_rule(sampling: SamplingConfig, longest_path: int, simulate: float | None = None) -> Accept:
    """How trees are verified: greedily, by sampling, or, for timing alone, to a mean number of tokens `simulate`.

    Equal settings give the same function, since compiled programs are looked up by it.

    Raises:
        ValueError: `simulate` is below 1, the least that a round gives, or not finite.
    """
    if simulate is not None and not 1.0 <= simulate < float("inf"):
        raise ValueError(f"expected a simulated acceptance length of at least 1, got {simulate}")
    return _accept_rule(sampling, longest_path, simulate)


def accept_greedy(longest_path: int, tree: Tree, logits: Float[Array, "nodes vocab"]) -> Accepted:
    """The path of first maxima: from each node to the child that is the target's most probable token."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def choose(level: Array, node: Array) -> tuple[Array, Array]:
        match = (tree.parents == node) & (tree.tokens == best[node])
        return jnp.argmax(match).astype(jnp.int32), jnp.any(match)

    path, count = walk(longest_path, choose)
    return Accepted(path, count, best[path[-1]])


def accept_sampled(
    sampling: SamplingConfig,
    longest_path: int,
    tree: Tree,
    logits: Float[Array, "nodes vocab"],
    key: Array,
    index: Int[Array, ""],
) -> Accepted:
    """Recursive rejection with one coin a node, and a bonus from what the refused children leave.

    Coins and bonuses are a function of `key` and of their token's position alone, and so do not depend on where rounds
    begin. Of `logits` only rows on the path are worked on: a nucleus sorts the vocabulary. Siblings must differ in
    their tokens.
    """

    def log_p(node: Array) -> Array:
        return log_probabilities(sampling, jax.lax.dynamic_index_in_dim(logits, node, keepdims=False))

    def choose(level: Array, node: Array) -> tuple[Array, Array]:
        coin = jax.random.uniform(position_keys(key, index + level)[0])
        return take_child(jnp.exp(log_p(node)), tree.tokens, tree.parents == node, coin)

    path, count = walk(longest_path, choose)
    last = path[-1]
    refused = jnp.zeros((logits.shape[-1],), jnp.bool_).at[tree.tokens].max(tree.parents == last)
    residual = jnp.where(refused, -jnp.inf, log_p(last))
    bonus = jax.random.categorical(position_keys(key, index + count - 1)[1], residual)
    return Accepted(path, count, bonus.astype(jnp.int32))


def take_child(
    probabilities: Float[Array, " vocab"],
    tokens: Int[Array, " nodes"],
    children: Bool[Array, " nodes"],
    coin: Float[Array, ""],
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The first of the `children` whose running sum of target probability exceeds `coin`, and whether there is one.

    The coin is scaled by the sum of children and rest, not by 1: where the rest is 0, a child is taken however the sums
    were rounded. A child of probability 0 never is.
    """
    mass = jnp.where(children, probabilities[tokens], 0.0)
    # Accelerators add in a tree, where a running sum may creep up over an addend of 0: hence `possible`.
    possible = mass > 0
    running = jnp.where(possible, jnp.cumsum(mass), 0.0)
    others = jnp.ones(probabilities.shape, jnp.bool_).at[tokens].min(~children)
    rest = jnp.sum(jnp.where(others, probabilities, 0.0))
    taken = possible & (running > coin * (jnp.max(running) + rest))
    return jnp.argmax(taken).astype(jnp.int32), jnp.any(taken)


def accept_simulated(
    mean_length: float,
    longest_path: int,
    tree: Tree,
    logits: Float[Array, "nodes vocab"],
    key: Array,
    index: Int[Array, ""],
) -> Accepted:
    """For timing without a trained head: so far down the path to the deepest node that `count` is `mean_length` on
    average, or to its end. The text means nothing.

    The length is one of the two whole numbers around the mean, by a coin of the root's position.
    """
    mask = ancestors(tree.parents)
    depth = depths(mask)
    deepest = jnp.argmax(depth)
    whole = int(mean_length)
    coin = jax.random.uniform(position_keys(key, index)[0])
    count = jnp.minimum(whole + (coin < mean_length - whole).astype(jnp.int32), depth[deepest] + 1)
    steps = jnp.minimum(jnp.arange(longest_path, dtype=jnp.int32), count - 1)
    path = jnp.argmax(mask[deepest][None, :] & (depth[None, :] == steps[:, None]), axis=-1).astype(jnp.int32)
    bonus = jnp.argmax(jax.lax.dynamic_index_in_dim(logits, path[-1], keepdims=False))
    return Accepted(path, count, bonus.astype(jnp.int32))


def walk(
    longest_path: int, choose: Callable[[Array, Array], tuple[Array, Array]]
) -> tuple[Int[Array, " path"], Int[Array, ""]]:
    """`path` and `count` of an `Accepted`: from the root to the child that `choose(level, node)` gives until it says
    that it found none. `level` counts from 0 at the root; a child is an int32 scalar."""

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        path, count, _ = state
        node = path[-1]
        child, found = choose(count - 1, node)
        ahead = jnp.arange(longest_path, dtype=jnp.int32) >= count
        return jnp.where(ahead & found, child, path), count + found.astype(jnp.int32), found

    def going(state: tuple[Array, Array, Array]) -> Array:
        _, count, found = state
        return found & (count < longest_path)

    start = jnp.zeros((longest_path,), jnp.int32), jnp.int32(1), jnp.bool_(True)
    path, count, _ = jax.lax.while_loop(going, step, start)
    return path, count


def cut_path(tree: Tree, accepted: Accepted, live: Bool[Array, " nodes"]) -> Accepted:
    """End the path before its first node that is not live, whose token becomes the bonus.

    That token was chosen by the logits of its parent, which is live; only what would follow from the node itself is
    given up. The root is live.
    """
    step = jnp.arange(accepted.path.shape[0], dtype=jnp.int32)
    dead = ~live[accepted.path] & (step < accepted.count)
    first = jnp.where(jnp.any(dead), jnp.argmax(dead).astype(jnp.int32), accepted.count)
    path = jnp.where(step < first, accepted.path, accepted.path[jnp.maximum(first - 1, 0)])
    bonus = jnp.where(first < accepted.count, tree.tokens[accepted.path[jnp.minimum(first, step[-1])]], accepted.bonus)
    return Accepted(path, first, bonus)


def position_keys(key: Array, position: Int[Array, ""]) -> tuple[Array, Array]:
    """The keys of a position's coin and of its bonus: two streams, so that neither says anything of the other."""
    coin, bonus = jax.random.split(jax.random.fold_in(key, position))
    return coin, bonus


@functools.cache
def _accept_rule(sampling: SamplingConfig, longest_path: int, simulate: float | None) -> Accept:
    if simulate is not None:
        return functools.partial(accept_simulated, simulate, longest_path)
    if sampling.greedy:
        return lambda tree, logits, key, index: accept_greedy(longest_path, tree, logits)
    return functools.partial(accept_sampled, sampling, longest_path)
