"""Draft trees against plain Python, on random log-probabilities and on such as tie everywhere."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tree_oracle
from driver import fast_jit

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.tree import (
    Beam,
    Tree,
    ancestors,
    check_draft_vocabulary,
    depths,
    first_level,
    next_level,
    prune,
)
from moespec_jax.nn.top_k import top_logarithms

SHAPES = [
    TreeConfig(depth=7, top_k=10, size=60),
    TreeConfig(depth=4, top_k=4, size=16),
    TreeConfig(depth=3, top_k=1, size=5),  # a chain, all of it
    TreeConfig(depth=6, top_k=1, size=3),  # a chain cut short
    TreeConfig(depth=0, top_k=5, size=6),
    TreeConfig(depth=2, top_k=3, size=22),  # the whole pool
]
CASES, VOCAB = 168, 12  # 1008 trees
KINDS = ["distinct", "few values", "exact zeros", "all equal", "impossible tokens", "both zeros"]


def grow(config: TreeConfig, root: Any, first: Any, later: Any, target_ids: Any) -> tuple[Tree, Beam]:
    """The tree and the stacked beams `[depth, top_k]` that were drafted, for log-probabilities that are given."""
    level, beam = first_level(config, *top_logarithms(first, config.top_k), target_ids)

    def expand(beam: Beam, step: Any) -> tuple[Beam, Any]:
        index, log_probs = step
        best = top_logarithms(log_probs, config.top_k)
        level, following = next_level(config, index, beam, *best, target_ids)
        return following, (level, beam)

    _, (levels, beams) = jax.lax.scan(expand, beam, (jnp.arange(config.depth, dtype=jnp.int32), later))
    return prune(config, root, level, levels), beams


def some_log_probs(rng: np.random.Generator, kind: str, rows: int) -> np.ndarray:
    shape = (rows, VOCAB)
    if kind == "distinct":
        return np.log(rng.dirichlet(np.full(VOCAB, 0.3), rows) + 1e-30).astype(np.float32).clip(max=0)
    values = {
        "few values": [-0.7, -1.1, -1.8],
        "exact zeros": [0.0, -1.0],
        "all equal": [-0.3],
        "impossible tokens": [-np.inf, -np.inf, -0.5],
        "both zeros": [0.0, -0.0],
    }
    return rng.choice(np.array(values[kind], np.float32), shape)


def some_cases(config: TreeConfig) -> tuple[np.ndarray, ...]:
    """`CASES` of root, first level, later levels `[depth, top_k, vocab]` and target ids, every kind in turn."""
    rng = np.random.default_rng(config.size)
    k, depth = config.top_k, config.depth
    rows = [some_log_probs(rng, KINDS[i % len(KINDS)], 1 + depth * k) for i in range(CASES)]
    ids = [np.sort(rng.choice(50, VOCAB, replace=False)) for _ in range(CASES)]
    first, later = np.stack([r[0] for r in rows]), np.stack([r[1:].reshape(depth, k, VOCAB) for r in rows])
    return rng.integers(50, size=CASES).astype(np.int32), first, later, np.stack(ids).astype(np.int32)


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_trees_and_beams_are_the_plain_python_ones(config: TreeConfig) -> None:
    cases = some_cases(config)
    trees, beams = fast_jit(jax.vmap(partial(grow, config)))(*map(jnp.asarray, cases))
    trees, beams = jax.tree.map(np.asarray, (trees, beams))
    assert {a.dtype for a in (trees.tokens, trees.parents, beams.tokens, beams.parents, beams.flat)} == {np.dtype("i4")}
    assert trees.scores.dtype == beams.scores.dtype == np.float32
    for case, (root, first, later, ids) in enumerate(zip(*cases, strict=True)):
        pool, expected = tree_oracle.grow(
            config.depth, config.top_k, first, lambda level, node, rows=later: rows[level, node.slot], ids.tolist()
        )
        tokens, parents, scores = tree_oracle.cut(pool, config.size, int(root))
        assert trees.tokens[case].tolist() == tokens and trees.parents[case].tolist() == parents
        np.testing.assert_array_equal(trees.scores[case], np.array(scores))
        for level, beam in enumerate(expected):
            assert beams.tokens[case, level].tolist() == [node.token for node in beam]
            assert beams.scores[case, level].tolist() == [node.score for node in beam]
            assert beams.flat[case, level].tolist() == [node.flat for node in beam]
            assert beams.parents[case, level].tolist() == [node.parent.slot if node.parent else 0 for node in beam]
            seen = [[i * config.top_k + n.slot for i, n in enumerate(node.line())] for node in beam]
            assert [np.flatnonzero(row).tolist() for row in beams.ancestors[case, level]] == seen


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_every_tree_is_one(config: TreeConfig) -> None:
    """Exactly `size` nodes; parents before children and never better than they; siblings best first; no path longer
    than announced; a chain where the beam is one wide."""
    trees, _ = fast_jit(jax.vmap(partial(grow, config)))(*map(jnp.asarray, some_cases(config)))
    depth = np.asarray(jax.vmap(lambda parents: depths(ancestors(parents)))(trees.parents))
    tokens, parents, scores = map(np.asarray, trees)
    assert tokens.shape == parents.shape == scores.shape == (CASES, config.size)
    assert np.all(parents[:, 0] == -1) and np.all(scores[:, 0] == 0) and not np.isnan(scores).any()
    assert np.all((parents[:, 1:] >= 0) & (parents[:, 1:] < np.arange(1, config.size)))
    above = np.take_along_axis(scores, parents[:, 1:], axis=1)
    assert np.all(scores[:, 1:] <= above)
    siblings = np.diff(parents[:, 1:]) == 0
    assert np.all(~siblings | (scores[:, 1:-1] >= scores[:, 2:]))
    for row, kin in zip(tokens.tolist(), parents.tolist(), strict=True):
        assert len({(p, t) for p, t in zip(kin, row, strict=True)}) == config.size
    assert depth.max() < config.longest_path
    if config.top_k == 1:
        assert np.all(parents == np.arange(config.size) - 1)


@pytest.mark.parametrize("size", [2, 3, 16, 17, 60])
def test_mask_rows_are_ancestors(size: int) -> None:
    """By walking up, for random trees, a chain, a star, and slots without a parent that a smaller tree leaves."""
    rng = np.random.default_rng(size)
    parents = [[-1, *(rng.integers(0, i) for i in range(1, size))] for _ in range(30)]
    parents += [[i - 1 for i in range(size)], [-1] + [0] * (size - 1)]
    parents += [[-1 if i > size // 2 else p for i, p in enumerate(row)] for row in parents]
    masks = fast_jit(jax.vmap(ancestors))(jnp.asarray(parents, jnp.int32))
    depth = fast_jit(jax.vmap(depths))(masks)
    assert masks.dtype == np.bool_ and depth.dtype == np.int32
    for mask, row, deep in zip(np.asarray(masks), parents, np.asarray(depth), strict=True):
        paths = [tree_oracle.path_to(row, i) for i in range(size)]
        assert [np.flatnonzero(m).tolist() for m in mask] == paths
        assert deep.tolist() == [len(path) - 1 for path in paths]


def test_a_parent_stays_ahead_of_its_children_whatever_the_logarithm_rounds_to() -> None:
    """`top_k` ranks -0 below 0, and a log-probability may come out a little above 0; neither may break the tree."""
    config = TreeConfig(depth=2, top_k=2, size=8)
    first = jnp.asarray([-0.0, -0.0, -1.0])
    later = jnp.full((2, 2, 3), 1e-6).at[:, :, 1].set(0.0)
    tree, _ = fast_jit(partial(grow, config))(jnp.int32(9), first, later, jnp.arange(3))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 2, 3]
    assert tree.scores.tolist() == [0.0] * 8 and not np.signbit(np.asarray(tree.scores)).any()


def test_a_wider_tree_than_the_draft_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top-k at most 4, .* got 5$"):
        check_draft_vocabulary(TreeConfig(depth=1, top_k=5, size=6), 4)
