"""Acceptance against plain Python, and its laws: what comes out is what would be drawn, and so distributed, without a
draft."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tree_oracle
from driver import at, fast_jit

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.tree import Tree

CASES, NODES, TREE_VOCAB, LONGEST = 1000, 12, 9, 7
SETTINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7, top_k=3),
    SamplingConfig(temperature=1.6, top_p=0.8),
    SamplingConfig(temperature=1.2, top_k=6, top_p=0.9),
]


def probabilities(sampling: SamplingConfig, logits: np.ndarray) -> list[float]:
    row = logits.astype(np.float64).tolist()
    return oracles.token_distribution(row, sampling.temperature, sampling.top_k, sampling.top_p)


def random_trees(seed: int) -> tuple[Tree, np.ndarray]:
    """Trees of `NODES` nodes of at most 4 children, no deeper than `LONGEST` allows, and logits full of ties."""
    rng = np.random.default_rng(seed)
    tokens, parents = np.zeros((2, CASES, NODES), np.int32)
    for case in range(CASES):
        kin, fan = [-1], rng.integers(1, 5)
        while len(kin) < NODES:
            open_nodes = [n for n in range(len(kin)) if kin.count(n) < fan]
            kin.append(int(rng.choice([n for n in open_nodes if len(tree_oracle.path_to(kin, n)) < LONGEST] or [0])))
        parents[case] = kin
        names = [rng.permutation(TREE_VOCAB) for _ in range(NODES)]
        tokens[case] = [rng.integers(TREE_VOCAB), *(names[p][kin[:i].count(p)] for i, p in enumerate(kin[1:], 1))]
    logits = np.round(rng.normal(size=(CASES, NODES, TREE_VOCAB)) * 2).astype(np.float32)
    # Let the drafted tokens be likely, or all paths would be short.
    kept = (parents >= 0) & (rng.random((CASES, NODES)) < 0.5)
    for case, node in zip(*np.nonzero(kept), strict=True):
        logits[case, parents[case, node], tokens[case, node]] += 4
    return Tree(tokens, parents, np.zeros(tokens.shape, np.float32)), logits


def verify(sampling: SamplingConfig, tree: Tree, logits: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """All trees at once, every one with the same key; their `index` differs."""
    rule = accept_rule(sampling, LONGEST)
    run = fast_jit(jax.vmap(rule, in_axes=(0, 0, None, 0)))
    accepted = run(jax.tree.map(jnp.asarray, tree), jnp.asarray(logits), jax.random.key(4), at(jnp.asarray(index)))
    path, count, bonus = (np.asarray(a) for a in (accepted.path, accepted.count, accepted.bonus))
    assert path.shape == (CASES, LONGEST) and path.dtype == count.dtype == bonus.dtype == np.int32
    for row, n in zip(path, count, strict=True):
        assert np.all(row[n:] == row[n - 1])
    return path, count, bonus


def test_greedy_takes_the_longest_path_of_first_maxima() -> None:
    tree, logits = random_trees(0)
    path, count, bonus = verify(SamplingConfig(), tree, logits, np.zeros(CASES, np.int32))
    assert set(count.tolist()) >= {1, 2, 3, 4}
    for case in range(CASES):
        expected, after = tree_oracle.greedy(
            tree.tokens[case].tolist(), tree.parents[case].tolist(), logits[case].tolist()
        )
        assert path[case, : count[case]].tolist() == expected and bonus[case] == after


def test_a_temperature_near_zero_accepts_as_greedy_does() -> None:
    tree, logits = random_trees(0)
    logits += np.random.default_rng(1).normal(size=logits.shape).astype(np.float32) / 100  # no ties
    index = np.arange(CASES, dtype=np.int32)
    for a, b in zip(*(verify(SamplingConfig(t), tree, logits, index) for t in (0.0, 1e-25)), strict=True):
        np.testing.assert_array_equal(a, b)


def perturbed(sampling: SamplingConfig, parents: list[int], logits: np.ndarray, index: int) -> list[list[float]]:
    """Log-probabilities of every node with the noise of its position, which nodes of one depth share."""
    rows = []
    for node, row in enumerate(logits):
        position = index + len(tree_oracle.path_to(parents, node)) - 1
        noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(4), position), (TREE_VOCAB,))
        with np.errstate(divide="ignore"):
            rows.append((np.log(probabilities(sampling, row)) + np.asarray(noise, np.float64)).tolist())
    return rows


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampling_is_greedy_on_perturbed_logits(sampling: SamplingConfig) -> None:
    """Two tokens within float32 rounding of each other could fall otherwise: less than one seed in 1000 has them."""
    tree, logits = random_trees(1)
    index = np.arange(CASES, dtype=np.int32) * 10
    path, count, bonus = verify(sampling, tree, logits, index)
    assert set(count.tolist()) >= {1, 2, 3, 4}
    for case in range(0, CASES, 10):
        parents = tree.parents[case].tolist()
        rows = perturbed(sampling, parents, logits[case], int(index[case]))
        expected, after = tree_oracle.greedy(tree.tokens[case].tolist(), parents, rows)
        assert path[case, : count[case]].tolist() == expected and bonus[case] == after


def test_draws_belong_to_positions_not_to_rounds() -> None:
    """A round that starts at the first accepted node, with what is left of the tree, ends as the round did."""
    tree, logits = random_trees(2)
    index = np.arange(CASES, dtype=np.int32) * 10
    path, count, bonus = verify(SETTINGS[0], tree, logits, index)
    later, later_logits, moved = Tree(*(a.copy() for a in tree)), logits.copy(), np.zeros((CASES, NODES), int)
    for case in range(CASES):
        kin = tree.parents[case].tolist()
        kept = [n for n in range(NODES) if path[case, 1] in tree_oracle.path_to(kin, n)] if count[case] > 1 else []
        moved[case, : len(kept)] = kept
        later.parents[case] = -1
        later.parents[case, 1 : len(kept)] = [kept.index(kin[n]) for n in kept[1:]]
        later.tokens[case], later_logits[case] = tree.tokens[case][moved[case]], logits[case][moved[case]]
    again, again_count, again_bonus = verify(SETTINGS[0], later, later_logits, index + 1)
    for case in np.flatnonzero(count > 1):
        assert moved[case][again[case, : again_count[case]]].tolist() == path[case, 1 : count[case]].tolist()
        assert again_bonus[case] == bonus[case]


@pytest.mark.parametrize("children", [1, 3, 6])
def test_a_child_is_accepted_as_often_as_the_children_are_probable(children: int) -> None:
    """As in recursive rejection, with the sum of their probabilities, and each with its own: within 5 standard
    deviations, a sound rule fails for less than one seed in 100,000."""
    sampling, draws, row = SamplingConfig(temperature=0.8, top_k=6), 4000, target_logits((children,))
    tokens = jnp.arange(children + 1, dtype=jnp.int32) - 1
    tree = Tree(tokens, jnp.minimum(tokens, 0).at[1:].set(0), jnp.zeros(tokens.shape))
    rule, keys = accept_rule(sampling, 2), jax.random.split(jax.random.key(2), draws)
    run = fast_jit(jax.vmap(rule, in_axes=(None, None, 0, None)))
    accepted = run(tree, jnp.broadcast_to(jnp.asarray(row), (children + 1, VOCAB)), keys, at(jnp.int32(3)))
    p = np.array(probabilities(sampling, row)[:children])
    often = np.bincount(np.asarray(accepted.path[:, 1]), minlength=children + 1)[1:]
    assert np.all(np.abs(often - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)))
    assert 0 < (accepted.count == 2).sum() == often.sum()


# --- the law: two tokens after a prompt, over a vocabulary of 7 -----------------------------------------------------

VOCAB, DRAWS = 7, 200_000
TREES = [TreeConfig(depth=2, top_k=1, size=4), TreeConfig(depth=1, top_k=3, size=8)]
CUTS = [SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.3, top_k=5, top_p=0.9)]


def target_logits(prefix: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([1, len(prefix), *prefix]).normal(size=VOCAB).astype(np.float32) * 1.5


def target(sampling: SamplingConfig, prefix: tuple[int, ...]) -> list[float]:
    return probabilities(sampling, target_logits(prefix))


def draft_tree(config: TreeConfig, prefix: tuple[int, ...]) -> tuple[Tree, list[tuple[int, ...]]]:
    """A tree that depends on the prefix alone, from a draft that knows a little of the target; its nodes' prefixes."""

    def draft(prefix: tuple[int, ...]) -> np.ndarray:
        logits = target_logits(prefix) + np.random.default_rng([2, len(prefix), *prefix]).normal(size=VOCAB)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def later(_: int, node: tree_oracle.Node) -> np.ndarray:
        return draft((*prefix, *(n.token for n in node.line())))

    pool, _ = tree_oracle.grow(config.depth, config.top_k, draft(prefix), later, range(VOCAB))
    tokens, parents, scores = tree_oracle.cut(pool, config.size, prefix[-1] if prefix else 0)
    prefixes = [(*prefix, *(tokens[i] for i in tree_oracle.path_to(parents, n)[1:])) for n in range(config.size)]
    return Tree(np.array(tokens, np.int32), np.array(parents, np.int32), np.array(scores)), prefixes


def joint(sampling: SamplingConfig) -> np.ndarray:
    """`[first, second]`: the exact distribution of two tokens drawn one by one."""
    return np.array([np.multiply(p, target(sampling, (t,))) for t, p in enumerate(target(sampling, ()))])


@pytest.mark.slow
@pytest.mark.parametrize("sampling", CUTS, ids=str)
@pytest.mark.parametrize("config", TREES, ids=str)
def test_two_tokens_are_distributed_as_the_target_says(config: TreeConfig, sampling: SamplingConfig) -> None:
    """Total variation from the exact distribution, over 200,000 texts, is within twice that of direct draws.

    Rounds follow each other with one key a text, as in decoding. Direct draws of this size are 0.004 to 0.005 away on
    average, with a standard deviation of 0.0007. The floor is the mean of 20 of them, and so a sound rule is at least 5
    standard deviations from failing: less than one seed in a million.
    """
    rounds = [draft_tree(config, prefix) for prefix in [(), *((t,) for t in range(VOCAB))]]
    trees = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree for tree, _ in rounds))
    logits = jnp.asarray([[target_logits(prefix) for prefix in prefixes] for _, prefixes in rounds])
    rule = accept_rule(sampling, config.longest_path)

    def emit(key: Any, number: Any, index: Any) -> tuple[Any, Any]:
        tree = jax.tree.map(lambda a: a[number], trees)
        accepted = rule(tree, logits[number], key, at(index))
        drafted = tree.tokens[accepted.path[1:3]]
        places = jnp.arange(2, dtype=jnp.int32) < accepted.count - 1
        return jnp.where(places, drafted, accepted.bonus), accepted.count

    def two_tokens(key: Any) -> Any:
        tokens, count = emit(key, jnp.int32(0), jnp.int32(5))
        more, _ = emit(key, 1 + tokens[0], jnp.int32(6))
        return jnp.stack([tokens[0], jnp.where(count > 1, tokens[1], more[0])])

    drawn = np.asarray(fast_jit(jax.vmap(two_tokens))(jax.random.split(jax.random.key(8), DRAWS)))
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(drawn.T), 1)
    exact = joint(sampling)
    direct = np.random.default_rng(9).multinomial(DRAWS, exact.ravel(), size=20).reshape(20, VOCAB, VOCAB)
    floor = np.mean(np.abs(direct / DRAWS - exact).sum((1, 2)) / 2)
    assert np.all(counts[exact == 0] == 0)
    assert np.abs(counts / DRAWS - exact).sum() / 2 < 2 * floor


# --- pretending, for timing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1.0, 2.0, 2.3, 3.75, 50.0])
def test_simulated_rounds_have_the_mean_length_that_was_asked_for(mean: float) -> None:
    """Down the deepest way, which here has 4 nodes; within 5 standard deviations, one seed in a million fails."""
    parents = [-1, 0, 0, 1, 2, 2, 5, 4]  # nodes 6 and 7 are deepest, and the lower counts
    tree = Tree(jnp.arange(8), jnp.asarray(parents), jnp.zeros((8,)))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 20)), jnp.float32)
    run = fast_jit(jax.vmap(partial(accept_rule(SamplingConfig(), 5, mean), tree, logits, jax.random.key(0))))
    accepted = jax.tree.map(np.asarray, run(at(jnp.arange(20_000, dtype=jnp.int32))))
    expected, share = min(mean, 4.0), min(mean, 4.0) % 1
    assert abs(accepted.count.mean() - expected) <= 5 * np.sqrt(share * (1 - share) / 20_000)
    assert set(accepted.count.tolist()) == {int(expected), int(np.ceil(expected))}
    for path, count in itertools.islice(zip(accepted.path.tolist(), accepted.count, strict=True), 50):
        line = [0, 2, 5, 6][:count]
        assert path == line + [line[-1]] * (5 - count)
    assert np.array_equal(accepted.bonus, np.argmax(logits, axis=-1)[accepted.path[:, -1]])


@pytest.mark.parametrize("mean", [0.9, -1.0, float("nan"), float("inf")])
def test_an_impossible_mean_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match="acceptance length"):
        accept_rule(SamplingConfig(), 5, mean)


def test_equal_settings_share_a_rule() -> None:
    """A program is compiled for a rule; a second one would compile it again."""
    assert accept_rule(SamplingConfig(temperature=1.0), 5) is accept_rule(SamplingConfig(temperature=1.0), 5, None)
