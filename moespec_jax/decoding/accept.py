"""Acceptance of one sequence's draft tree: the path that the target accepts, and the bonus token after it.

Drafts are a deterministic function of the text so far, so each proposal is a point mass, and recursive rejection
(SpecInfer, arXiv:2305.09781) reduces to one uniform draw u at each node: with children c_1, c_2, ... in order, accept
the first c_i with p(c_1) + ... + p(c_i) > u, where p is the target's distribution at the node; if there is none, the
bonus is drawn from p without the children, renormalised. The output has the target's distribution. Callers `vmap` over
the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.sampling import SamplingConfig, log_probabilities
from moespec_jax.decoding.tree import Tree, ancestors, depths
from moespec_jax.nn.summary import summary


@struct.dataclass
class Accepted:
    """An accepted path. A round gains the tokens of the path after the root, then the bonus.

    Fields:
        path: node indices, the root first; from `count` on it repeats the last accepted node.
        count: number of nodes, the root included, which is also the number of tokens gained.
        bonus: token after the last accepted node.
    """

    path: Int[Array, "*batch path"]
    count: Int[Array, "*batch"]
    bonus: Int[Array, "*batch"]

    __repr__ = summary


# (tree, logits [nodes, vocab], the sequence's random key, position of the first token after the root) -> Accepted.
Accept = Callable[[Tree, Array, Array, Array], Accepted]


def accept_rule(sampling: SamplingConfig, longest_path: int, simulate: float | None = None) -> Accept:
    """Choose the acceptance: greedy, sampled, or, for timing, simulated with a mean number of tokens `simulate`.

    Equal settings give the same function object, which identifies compiled programs.

    Raises:
        ValueError: `simulate` is below 1, the least that a round gains, or not finite.
    """
    if simulate is not None and not 1.0 <= simulate < float("inf"):
        raise ValueError(f"expected a simulated acceptance length of at least 1, got {simulate}")
    return _accept_rule(sampling, longest_path, simulate)


def accept_greedy(longest_path: int, tree: Tree, logits: Float[Array, "nodes vocab"]) -> Accepted:
    """Accept from each node the child that is the target's most probable token."""
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
    """Accept by recursive rejection; siblings must differ in their tokens.

    Random draws are a function of `key` and of their token's position alone, and so do not depend on where rounds
    begin. Only rows of `logits` on the path are processed, since top-p sorts the vocabulary.
    """

    def log_p(node: Array) -> Array:
        return log_probabilities(sampling, jax.lax.dynamic_index_in_dim(logits, node, keepdims=False))

    def choose(level: Array, node: Array) -> tuple[Array, Array]:
        u = jax.random.uniform(position_keys(key, index + level)[0])
        return take_child(jnp.exp(log_p(node)), tree.tokens, tree.parents == node, u)

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
    u: Float[Array, ""],
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """Find the first of the `children` whose running sum of target probability exceeds `u`; also whether there is one.

    `u` is scaled by the sum of children and rest, not by 1: where the rest is 0, a child is accepted however the sums
    are rounded. A child of probability 0 never is.
    """
    mass = jnp.where(children, probabilities[tokens], 0.0)
    # Accelerators add in a tree, where a running sum may creep up over an addend of 0: hence `possible`.
    possible = mass > 0
    running = jnp.where(possible, jnp.cumsum(mass), 0.0)
    others = jnp.ones(probabilities.shape, jnp.bool_).at[tokens].min(~children)
    rest = jnp.sum(jnp.where(others, probabilities, 0.0))
    taken = possible & (running > u * (jnp.max(running) + rest))
    return jnp.argmax(taken).astype(jnp.int32), jnp.any(taken)


def accept_simulated(
    mean_length: float,
    longest_path: int,
    tree: Tree,
    logits: Float[Array, "nodes vocab"],
    key: Array,
    index: Int[Array, ""],
) -> Accepted:
    """Accept part of the path to the deepest node, so that `count` is `mean_length` on average where the path is long
    enough: for timing without a trained head. The text is meaningless.

    `count` is one of the two integers around the mean, drawn by the root's position.
    """
    mask = ancestors(tree.parents)
    depth = depths(mask)
    deepest = jnp.argmax(depth)
    whole = int(mean_length)
    u = jax.random.uniform(position_keys(key, index)[0])
    count = jnp.minimum(whole + (u < mean_length - whole).astype(jnp.int32), depth[deepest] + 1)
    steps = jnp.minimum(jnp.arange(longest_path, dtype=jnp.int32), count - 1)
    path = jnp.argmax(mask[deepest][None, :] & (depth[None, :] == steps[:, None]), axis=-1).astype(jnp.int32)
    bonus = jnp.argmax(jax.lax.dynamic_index_in_dim(logits, path[-1], keepdims=False))
    return Accepted(path, count, bonus.astype(jnp.int32))


def walk(
    longest_path: int, choose: Callable[[Array, Array], tuple[Array, Array]]
) -> tuple[Int[Array, " path"], Int[Array, ""]]:
    """Walk from the root to the child of `choose(level, node) -> (child, found)` while one is found; returns `path` and
    `count` of an `Accepted`. `level` counts from 0 at the root; a child is an int32 scalar."""

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


def cut_path(tree: Tree, accepted: Accepted, kept: Bool[Array, " nodes"]) -> Accepted:
    """End the path before its first pruned node, whose token becomes the bonus.

    That token was accepted by the logits of its parent, which is kept; what follows from the node itself is dropped.
    The root is kept.
    """
    step = jnp.arange(accepted.path.shape[0], dtype=jnp.int32)
    pruned = ~kept[accepted.path] & (step < accepted.count)
    first = jnp.where(jnp.any(pruned), jnp.argmax(pruned).astype(jnp.int32), accepted.count)
    path = jnp.where(step < first, accepted.path, accepted.path[jnp.maximum(first - 1, 0)])
    bonus = jnp.where(first < accepted.count, tree.tokens[accepted.path[jnp.minimum(first, step[-1])]], accepted.bonus)
    return Accepted(path, first, bonus)


def position_keys(key: Array, position: Int[Array, ""]) -> tuple[Array, Array]:
    """Keys of a position's uniform draw and of its bonus token, which are independent."""
    uniform, bonus = jax.random.split(jax.random.fold_in(key, position))
    return uniform, bonus


@functools.cache
def _accept_rule(sampling: SamplingConfig, longest_path: int, simulate: float | None) -> Accept:
    if simulate is not None:
        return functools.partial(accept_simulated, simulate, longest_path)
    if sampling.greedy:
        return lambda tree, logits, key, index: accept_greedy(longest_path, tree, logits)
    return functools.partial(accept_sampled, sampling, longest_path)
