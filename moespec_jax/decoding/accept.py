"""Acceptance of one sequence's draft tree: the path that the target accepts, and the bonus token after it.

The target's own token at a node is the one that plain decoding would draw there: the most probable one or, where tokens
are sampled, a draw with the noise of its sequence and position (`sampling.draw_token`). The child that equals it is
accepted, and where there is none it is the bonus. So drafts decide how many tokens a round gains, but not which
(drafter-invariant speculation, arXiv:2408.07978): a seed gives the same text with any drafter and without one. Callers
`vmap` over the batch.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moespec_jax.decoding.history import History, extended
from moespec_jax.decoding.sampling import SamplingConfig, draw_token
from moespec_jax.decoding.tree import Tree, ancestors, depths
from moespec_jax.nn.best_tokens import BestTokens, best_of
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


# (tree, logits [nodes, vocab], the sequence's random key, its tokens up to the root) -> Accepted.
Accept = Callable[[Tree, Array, Array, History], Accepted]


@dataclasses.dataclass(frozen=True)
class BestTokenAccept:
    """An `Accept` that depends on nothing of the logits but each node's most probable token, which can take their
    place."""

    function: Callable[[Tree, Array | BestTokens, Array, History], Accepted]

    def __call__(self, tree: Tree, logits: Array | BestTokens, key: Array, history: History) -> Accepted:
        """Accept a path of one sequence's tree."""
        return self.function(tree, logits, key, history)


def accept_rule(sampling: SamplingConfig, longest_path: int, simulate: float | None = None) -> Accept:
    """Choose the acceptance: of the target's own tokens or, for timing, simulated with a mean number of tokens
    `simulate`.

    Equal settings give the same function object, which identifies compiled programs.

    Raises:
        ValueError: `simulate` is below 1, the least that a round gains, or not finite.
    """
    if simulate is not None and not 1.0 <= simulate < float("inf"):
        raise ValueError(f"expected a simulated acceptance length of at least 1, got {simulate}")
    return _accept_rule(sampling, longest_path, simulate)


def accept_own(
    sampling: SamplingConfig,
    longest_path: int,
    tree: Tree,
    logits: Float[Array, "nodes vocab"] | BestTokens,
    key: Array,
    history: History,
) -> Accepted:
    """Accept from each node the child that is the target's own token there; siblings must differ in their tokens.

    Only rows of `logits` on the path are processed: top-p sorts the vocabulary, and a CPU is slow at `argmax`. A
    penalty counts the tokens of the node's own path.
    """

    def choose(accepted: Accepted) -> tuple[Array, Array, Array]:
        node = accepted.path[-1]
        row = _row(logits, node)
        drafted = jnp.roll(tree.tokens[accepted.path], -1)  # the root is in the history
        token = draw_token(sampling, key, row, extended(history, drafted, accepted.count - 1))
        match = (tree.parents == node) & (tree.tokens == token)
        return jnp.argmax(match).astype(jnp.int32), jnp.any(match), token

    return walk(longest_path, choose)


def accept_simulated(
    mean_length: float,
    longest_path: int,
    tree: Tree,
    logits: Float[Array, "nodes vocab"] | BestTokens,
    key: Array,
    history: History,
) -> Accepted:
    """Accept part of the path to the deepest node, so that `count` is `mean_length` on average where the path is long
    enough: for timing without a trained head. The text is meaningless.

    `count` is one of the two integers around the mean, drawn by the root's position.
    """
    mask = ancestors(tree.parents)
    depth = depths(mask)
    deepest = jnp.argmax(depth)
    whole = int(mean_length)
    u = jax.random.uniform(jax.random.fold_in(key, history.length))
    count = jnp.minimum(whole + (u < mean_length - whole).astype(jnp.int32), depth[deepest] + 1)
    steps = jnp.minimum(jnp.arange(longest_path, dtype=jnp.int32), count - 1)
    path = jnp.argmax(mask[deepest][None, :] & (depth[None, :] == steps[:, None]), axis=-1).astype(jnp.int32)
    return Accepted(path, count, best_of(_row(logits, path[-1])).ids)


def walk(longest_path: int, choose: Callable[[Accepted], tuple[Array, Array, Array]]) -> Accepted:
    """Walk from the root to the child of `choose(accepted so far) -> (child, found, token)` while one is found; the
    token of the last node, `accepted.path[-1]`, is the bonus. Child and token are int32; a leaf has no child."""

    def step(state: tuple[Accepted, Array]) -> tuple[Accepted, Array]:
        accepted, _ = state
        child, found, token = choose(accepted)
        ahead = jnp.arange(longest_path, dtype=jnp.int32) >= accepted.count
        path = jnp.where(ahead & found, child, accepted.path)
        return Accepted(path, accepted.count + found.astype(jnp.int32), token), found

    start = Accepted(jnp.zeros((longest_path,), jnp.int32), jnp.int32(1), jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[1], step, (start, jnp.bool_(True)))[0]


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


@functools.cache
def _accept_rule(sampling: SamplingConfig, longest_path: int, simulate: float | None) -> Accept:
    if simulate is not None:
        return BestTokenAccept(functools.partial(accept_simulated, simulate, longest_path))
    own = functools.partial(accept_own, sampling, longest_path)
    return BestTokenAccept(own) if sampling.best_suffices else own


def _row(outputs: Array | BestTokens, node: Int[Array, ""]) -> Array | BestTokens:
    """Take the logits, or the best token, of one node."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, node, keepdims=False), outputs)
