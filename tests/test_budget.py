"""Every rule of the budget against plain Python in float64, ties included; and what must hold for every rule."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import budget_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit

from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig, RouterConfig
from moespec_jax.decoding.budget import restrict
from moespec_jax.decoding.budget_config import BudgetConfig, budget_warning, is_exact, resolve
from moespec_jax.decoding.budget_rules import ANCHORS, COVERAGES, EXPERT_WEIGHTS, SCORES, SIZES, Nodes
from moespec_jax.decoding.tree import ancestors, depths
from moespec_jax.nn.routing import Restricted, Routing, route

# Numbers of experts and of those active, and whether weights are renormalised: as the families have them, and not.
ROUTERS = {
    "olmoe": (64, 8, False),
    "qwen3_moe": (128, 8, True),
    "qwen2_moe": (60, 4, False),
    "qwen2_moe renormalised": (60, 4, True),
    "mixtral": (8, 2, True),
    "few": (6, 3, False),
    "sigmoid": (32, 4, True),
    "sigmoid in groups": (24, 3, False),
}
SIGMOIDS = {"sigmoid": (1, 1, 2.5), "sigmoid in groups": (6, 2, 1.0)}
# A third of all combinations, in which any three settings still meet in every way.
TABLES = dict(score=SCORES, credit=EXPERT_WEIGHTS, anchor=ANCHORS, coverage=COVERAGES, size=SIZES)
RULES = [
    dict(zip(TABLES, names, strict=True))
    for names in itertools.product(*TABLES.values())
    if sum(list(table).index(name) for table, name in zip(TABLES.values(), names, strict=True)) % 3 == 0
]
BATCH, NODES, DRAWS = 2, 9, 6


def config_of(router: str) -> DecoderConfig:
    """As much of a decoder as routing needs; four sparse layers."""
    total, k, norm = ROUTERS[router]
    fields: dict[str, Any] = dict(
        model_type="qwen3_moe", vocab_size=8, hidden_size=total, intermediate_size=8, moe_intermediate_size=8,
        num_hidden_layers=4, num_attention_heads=1, num_key_value_heads=1, head_dim=8, num_experts=total,
        num_experts_per_tok=k, norm_topk_prob=norm, max_position_embeddings=64, rms_norm_eps=1e-6, hidden_act="silu",
    )  # fmt: skip
    config = read_config(fields)
    if router not in SIGMOIDS:
        return config
    groups, chosen, scale = SIGMOIDS[router]
    form = RouterConfig("sigmoid", correction=True, groups=groups, groups_per_tok=chosen, scale=scale)
    return dataclasses.replace(config, router=form)


def sigmoid_of(router: str) -> budget_oracle.Sigmoid | None:
    """The oracle's sigmoid router of that name; its correction decides often."""
    if router not in SIGMOIDS:
        return None
    correction = np.random.default_rng(len(router)).normal(0, 0.3, ROUTERS[router][0]).astype(np.float32)
    return budget_oracle.Sigmoid(correction.tolist(), *SIGMOIDS[router])


def random_nodes(seed: int) -> tuple[Nodes, budget_oracle.Rows]:
    """Two trees and their rows as the oracle takes them; the second tree's sequence may be finished."""
    rng = np.random.default_rng(seed)
    parents = np.array([[-1, *(rng.integers(0, i) for i in range(1, NODES))] for _ in range(BATCH)], np.int32)
    own = np.stack([np.asarray(ancestors(jnp.asarray(row))) for row in parents])
    depth = np.stack([np.asarray(depths(jnp.asarray(mask))) for mask in own])
    # Halves, quarters and certainty: chances meet often, the root's too, and every product is exact.
    gain = rng.choice([0.5, 0.75, 1.0], (BATCH, NODES))
    gain[:, 0] = 1.0
    chance = np.prod(np.where(own, gain[:, None, :], 1.0), axis=2)
    committed = np.sort(rng.random(NODES))[::-1] / 2
    committed[0] = 1.0
    finished = seed % 3 == 2
    nodes = Nodes(
        *(jnp.asarray(a, d) for a, d in ((chance, jnp.float32), (depth, jnp.int32), (own, bool))),
        jnp.asarray(committed, jnp.float32),
    )
    rows = budget_oracle.Rows(
        valid=[not (finished and t >= NODES) for t in range(BATCH * NODES)],
        chance=chance.ravel().tolist(),
        depth=depth.ravel().tolist(),
        ancestors=[(b * NODES + np.flatnonzero(own[b, i])).tolist() for b in range(BATCH) for i in range(NODES)],
        peers=[int((depth[b] == depth[b, i]).sum()) for b in range(BATCH) for i in range(NODES)],
        committed=np.asarray(committed, np.float32).astype(float).tolist(),
    )
    return nodes, rows


def random_logits(seed: int, total: int) -> np.ndarray:
    """Every other draw with ties: of experts that are alike to all rows, and of rows alike to all experts."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(BATCH * NODES, total)).astype(np.float32) * 2
    if seed % 2:
        logits[:, rng.permutation(total)[: total // 2]] = logits[:, rng.integers(0, total, 1)]
        logits[3] = 0.0
    return logits


def routed(router: str, logits: jax.Array, valid: jax.Array) -> tuple[Routing, jax.Array]:
    """`route` of given logits."""
    form, identity = sigmoid_of(router), jnp.eye(logits.shape[1], dtype=jnp.float32)
    correction = None if form is None else jnp.asarray(form.correction, jnp.float32)
    return route(config_of(router), identity, logits, valid, None, correction)


@cache
def compiled(rule: BudgetConfig, router: str) -> Callable[..., Restricted]:
    config = config_of(router)

    def run(nodes: Nodes, logits: jax.Array, valid: jax.Array) -> Restricted:
        natural, probabilities = routed(router, logits, valid)
        return restrict(rule, nodes, config.norm_topk_prob, 1, probabilities, natural, valid)

    return fast_jit(run)


def check(rule: BudgetConfig, router: str, bound: int, seed: int) -> bool:
    """Compare one draw; False if it depends on less than float32 can resolve."""
    total, k, norm = ROUTERS[router]
    nodes, rows = random_nodes(seed)
    logits = random_logits(seed, total)
    expected = budget_oracle.restrict(rule, bound, logits, k, norm, rows, sigmoid_of(router))
    if expected.closest < 1e-5:
        return False
    got = compiled(rule, router)(nodes, jnp.asarray(logits), jnp.asarray(rows.valid))
    assert [e for e in got.shortlist.tolist() if e < total] == expected.shortlist
    assert got.kept.tolist() == expected.live and got.replaced.tolist() == expected.replaced
    np.testing.assert_allclose(float(got.mass_kept), expected.mass_kept, atol=1e-5)  # sums of up to 1000 numbers
    for t, weights in enumerate(expected.weights):
        ids, found = got.routing.experts[t].tolist(), got.routing.weights[t].tolist()
        assert {e for e in ids if e < total} == set(weights) and len(set(ids) - {total}) == sum(e < total for e in ids)
        np.testing.assert_allclose([found[ids.index(e)] for e in weights], list(weights.values()), atol=1e-6)
        assert all(w == 0 for e, w in zip(ids, found, strict=True) if e == total)
    return True


@pytest.mark.slow_except("0", "24")
@pytest.mark.parametrize("number", range(0, len(RULES), 6))
def test_rules_are_what_the_oracle_says(number: int) -> None:
    """Six rules a case, each on a router of its own, so that all rules and routers meet over the cases."""
    decided = drawn = 0
    for index in range(number, min(number + 6, len(RULES))):
        router = list(ROUTERS)[(index + index // 6) % len(ROUTERS)]
        total, k, _ = ROUTERS[router]
        bound = max(k, total // 4 if index % 2 else total // 2)
        least = (0.0, 0.6, 1.0)[index // 2 % 3]
        rule = BudgetConfig((k, bound, k, k), **RULES[index], mass=0.7, min_kept_weight=least)
        for seed in range(DRAWS):
            drawn += 1
            decided += check(rule, router, bound, seed)
    assert decided > 0.8 * drawn


@pytest.mark.slow_except("olmoe-8")
@pytest.mark.parametrize(("router", "groups"), [("olmoe", 8), ("qwen3_moe", 4), ("qwen2_moe", 3), ("mixtral", 4)])
def test_balanced_budgets_are_what_the_oracle_says(router: str, groups: int) -> None:
    """Divided among groups of experts: no group has more than its share, however far apart their scores are."""
    total, k, _ = ROUTERS[router]
    bound, decided, drawn = max(k, total // 3), 0, 0
    likely: dict[str, Any] = dict(anchor="likely")
    for names in ({}, dict(anchor="root", size="mass"), likely | dict(size="rank"), likely | dict(coverage="truncate")):
        rule = BudgetConfig((k, bound, k, k), groups=groups, min_kept_weight=0.4, **names)
        assert rule.slots == -(-bound // groups) * groups
        for seed in range(DRAWS):
            drawn += 1
            decided += check(rule, router, bound, seed)
    assert decided > 0.5 * drawn


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("anchor", ["none", "likely"])
def test_a_budget_of_all_experts_changes_no_bit_of_the_routing(router: str, coverage: str, anchor: str) -> None:
    config = config_of(router)
    rule = resolve(BudgetConfig(1.0, coverage=coverage, anchor=anchor, score="path", min_kept_weight=1.0), config)
    for seed in range(DRAWS):
        nodes, rows = random_nodes(seed)
        logits, valid = jnp.asarray(random_logits(seed, config.num_experts)), jnp.asarray(rows.valid)
        natural, _ = fast_jit(partial(routed, router))(logits, valid)
        got = compiled(rule, router)(nodes, logits, valid)
        same((got.routing.experts, got.routing.weights), (natural.experts, natural.weights))
        assert not got.replaced.any() and got.kept.tolist() == rows.valid


@pytest.mark.parametrize("router", [router for router in ROUTERS if router not in SIGMOIDS])
@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("anchor", ["root", "likely"])
def test_rows_that_lose_everything_stay_finite(router: str, coverage: str, anchor: str) -> None:
    """Every row is certain of other experts than the roots', so that float32 leaves it nothing inside the shortlist."""
    total, k, _ = ROUTERS[router]
    nodes, _ = random_nodes(0)
    roots = np.arange(BATCH * NODES) % NODES == 0
    logits = np.zeros((BATCH * NODES, total), np.float32)
    logits[roots, :k] = logits[~roots, k : 2 * k] = 300.0
    rule = BudgetConfig((k,) * 4, coverage=coverage, anchor=anchor, anchor_probability=1.0)
    got = compiled(rule, router)(nodes, jnp.asarray(logits), jnp.ones((BATCH * NODES,), bool))
    weights = np.asarray(got.routing.weights)
    assert np.isfinite(weights).all() and not weights[~roots].any() and got.replaced.tolist() == (~roots).tolist()
    np.testing.assert_allclose(weights[roots].sum(axis=1), 1.0, rtol=1e-6)


def test_budgets_are_numbers_of_experts_a_layer() -> None:
    config = config_of("olmoe")
    assert resolve(BudgetConfig(0.25), config).experts == (16,) * 4
    assert resolve(BudgetConfig(1.0), config).experts == (64,) * 4
    assert resolve(BudgetConfig((8, 0.5, 64, 9)), config).experts == (8, 32, 64, 9)


@pytest.mark.parametrize("experts", [7, 65, 0, -1, 0.1, 1.5, -0.5, float("nan"), (16, 16), (16, 16, 16, 2)])
def test_budgets_out_of_range_are_refused(experts: Any) -> None:
    with pytest.raises(ValueError, match="expected .* expert budget"):
        resolve(BudgetConfig(experts), config_of("olmoe"))


def test_groups_divide_the_experts() -> None:
    with pytest.raises(ValueError, match=r"expected a budget's groups to divide the 64 experts; got 3"):
        resolve(BudgetConfig(16, groups=3), config_of("olmoe"))
    with pytest.raises(ValueError, match=r"expected a budget of at least one group of experts, got 0"):
        BudgetConfig(16, groups=0)


@pytest.mark.parametrize("name", ["mass", "anchor_probability", "min_kept_weight"])
def test_shares_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"budget's {name} from 0 to 1, got 1.5"):
        BudgetConfig(16, **{name: 1.5})


def test_tight_budgets_are_warned_about() -> None:
    config = config_of("olmoe")
    warned = {b: budget_warning(resolve(BudgetConfig(b), config), config) is not None for b in (8, 15, 16, 64)}
    assert warned == {8: True, 15: True, 16: False, 64: False}


def test_what_is_exact() -> None:
    config = config_of("olmoe")

    def exact(batch: int, **rule: Any) -> bool:
        return is_exact(resolve(BudgetConfig(**rule), config), config, batch)

    assert exact(9, experts=64) and not exact(1, experts=63) and not exact(1, experts=64, size="mass")
    pruning: dict[str, Any] = dict(min_kept_weight=1.0, anchor="likely")
    assert exact(2, experts=16, **pruning) and not exact(3, experts=16, **pruning)
    assert exact(1, experts=16, **pruning, size="mass") and not exact(2, experts=16, **pruning, size="mass")
    # The experts of the root may all be in one group.
    assert not exact(1, experts=8, min_kept_weight=1.0, anchor="root", groups=2)
    assert exact(1, experts=8, min_kept_weight=1.0, anchor="root") and not exact(1, experts=8, min_kept_weight=1.0)
