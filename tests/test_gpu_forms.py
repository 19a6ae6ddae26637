"""Parts of a layer as Triton kernels: interpreted against float64, and which of them run where (lowered for CUDA)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from driver import fast_jit

from benchmarks.gpu_forms import TOLERANCE, Case, cases_of, error_of
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.config import RouterConfig
from moespec_jax.decoding.budget import restrict
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.budget_rules import EXPERT_WEIGHTS, Nodes
from moespec_jax.nn import attention_gpu
from moespec_jax.nn.attention import Attention, write_qkv
from moespec_jax.nn.attention_gpu import fused_attention
from moespec_jax.nn.backend import BACKENDS, PLAIN
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.cache_gpu import move_rows
from moespec_jax.nn.decoder import forward
from moespec_jax.nn.experts.distinct_gpu import list_distinct, sum_places
from moespec_jax.nn.norm_gpu import fused_add_norm
from moespec_jax.nn.qkv_gpu import fused_qkv
from moespec_jax.nn.quantization import QUANTIZATIONS
from moespec_jax.nn.routing import Routing, route
from moespec_jax.nn.routing_gpu import choose
from moespec_jax.nn.shortlist_gpu import fused_shortlist
from moespec_jax.nn.top_k_gpu import fused_most_probable

# Said at lowering, from jax 0.11 on; `experts/triton_gpu.py` says why it is used all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
CONFIG = read_config(tiny.CONFIG)
# Values are rounded to 8 bits several times on the way.
BFLOAT16 = 2**-7


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "groups", "slots", "head"),
    [
        pytest.param(1, 1, 4, 4, 128, 64, id="one token"),
        pytest.param(2, 5, 6, 2, 192, 128, id="groups of three and an odd number of tiles"),
        pytest.param(1, 33, 4, 2, 128, 64, id="two tiles of rows, the second in part"),
    ],
)
def test_attention_matches_and_reads_no_tile_that_no_one_attends_to(
    batch: int, tokens: int, heads: int, groups: int, slots: int, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "BLOCKS", 2 * batch * groups)  # two parts where tiles are even
    q, k, v = (normal(i, *s) for i, s in enumerate([(batch, tokens, heads, head), *[(batch, groups, slots, head)] * 2]))
    mask = np.random.default_rng(3).random((batch, tokens, slots)) < 0.4
    mask[:, :, 64:], mask[:, :, 1] = False, True
    expected = oracles.attend(q, k, v, mask)
    k, v = (store.at[:, :, 64:].set(jnp.nan) for store in (k, v))
    got = fast_jit(lambda *a: fused_attention(*a, interpret=True))(q, k, v, jnp.asarray(mask))
    close(got, expected, BFLOAT16)


def test_a_row_that_attends_to_nothing_is_finite() -> None:
    q, k = normal(0, 1, 2, 2, 64), normal(1, 1, 2, 64, 64)
    mask = jnp.zeros((1, 2, 64), bool).at[0, 0, 3].set(True)
    got = np.asarray(fused_attention(q, k, k, mask, interpret=True), np.float64)
    assert np.isfinite(got).all()
    close(got[0, 0], np.asarray(k[0, :, 3], np.float64).reshape(-1), BFLOAT16)


@pytest.mark.parametrize("norm", ["flat", "head", "none"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_match_those_of_float32(norm: Any, clip: float | None, bias: bool) -> None:
    batch, tokens, heads, groups, slots, head, model = 2, 3, 6, 2, 32, 16, 24
    config = dataclasses.replace(CONFIG, qk_norm=norm, clip_qkv=clip, head_dim=head)
    sizes = {"flat": (heads * head, groups * head), "head": (head, head)}.get(norm)
    widths = (heads * head, groups * head, groups * head)
    weights = Attention(
        *(normal(i, width, model) for i, width in enumerate(widths)),
        normal(9, heads * head, model),
        *((normal(10 + i, width) for i, width in enumerate(widths)) if bias else (None,) * 3),
        q_norm=None if sizes is None else normal(20, sizes[0]),
        k_norm=None if sizes is None else normal(21, sizes[1]),
    )
    x, angle = normal(4, batch, tokens, model), normal(5, batch, tokens, head // 2, dtype=jnp.float32)
    kv = normal(6, batch, groups, slots, head), normal(7, batch, groups, slots, head)
    arguments = (weights, x, (jnp.cos(angle), jnp.sin(angle)), kv, jnp.asarray([3, 20], jnp.int32))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, arguments)
    expected = fast_jit(lambda *a: write_qkv(config, *a))(*wide)
    got = fast_jit(lambda *a: fused_qkv(config, *a, interpret=True))(*arguments)
    jax.tree.map(lambda a, b: close(a, b, 2 * BFLOAT16), got, expected)
    for store, old in zip(got[1], kv, strict=True):  # every other row is as it was
        written = (np.asarray(store) != np.asarray(old)).any(axis=(1, 3))
        assert [np.flatnonzero(row).tolist() for row in written] == [[3, 4, 5], [20, 21, 22]]


@pytest.mark.parametrize("width", [64, 96])
def test_sum_and_norm(width: int) -> None:
    x, y, weight = normal(0, 3, width), normal(1, 3, width), normal(2, width)
    total, normed = fused_add_norm([x, y], weight, 1e-5, interpret=True)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x + y))
    close(normed, oracles.rms_norm(total, weight, 1e-5), BFLOAT16)
    same, _ = fused_add_norm([x], weight, 1e-5, interpret=True)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(x))


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 6, 2), (5, 64, 8), (3, 20, 3)])
@pytest.mark.parametrize("normalised", [False, True])
def test_experts_are_the_most_probable_the_lower_id_first_among_equals(
    tokens: int, experts: int, k: int, normalised: bool
) -> None:
    config = dataclasses.replace(CONFIG, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=normalised)
    logits = np.round(np.random.default_rng(0).normal(size=(tokens, experts)) * 2) / 2  # equals among them
    valid = np.arange(tokens) != 1
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exp / exp.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(shares, order, axis=1)
    weights = weights / weights.sum(axis=1, keepdims=True) if normalised else weights
    ids, got, probabilities = choose(
        config, jnp.asarray(logits, jnp.float32), jnp.asarray(valid, jnp.int32), interpret=True
    )
    np.testing.assert_array_equal(np.asarray(ids), np.where(valid[:, None], order, experts))
    close(got, np.where(valid[:, None], weights, 0), 1e-6)
    close(probabilities, shares, 1e-6)


def test_a_token_whose_logits_are_not_finite_has_no_expert() -> None:
    config = dataclasses.replace(CONFIG, num_experts=6, num_experts_per_tok=2)
    logits = jnp.zeros((2, 6)).at[0, 3].set(jnp.nan)
    ids, weights, _ = choose(config, logits, jnp.ones((2,), jnp.int32), interpret=True)
    assert ids.tolist() == [[6, 6], [0, 1]] and not weights[0].any()


@pytest.mark.parametrize("most", [None, 5])
def test_distinct_experts_and_the_sums_of_their_outputs(most: int | None) -> None:
    experts, tokens, k, model = 12, 7, 3, 40
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, 5)), axis=1)[:, :k] * 2 + 1  # five distinct ones at most
    chosen[2], chosen[3, 1] = experts, experts
    weights = np.where(chosen < experts, rng.uniform(0.1, 1.0, chosen.shape), 0.0)
    routing = Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(weights, jnp.float32), max_distinct=most)
    ids, places = list_distinct(routing, experts, interpret=True)
    used = sorted(set(chosen[chosen < experts].tolist()))
    assert len(ids) == (most or experts) and ids.tolist() == used + [experts] * (len(ids) - len(used))
    for expert, place in zip(chosen.reshape(-1), np.asarray(places).reshape(-1), strict=True):
        assert place == (len(ids) if expert == experts else used.index(expert))
    outputs = rng.normal(size=(len(ids), tokens, model))
    expected = np.zeros((tokens, model))
    for t, row in enumerate(chosen):
        for j, expert in enumerate(row):
            if expert < experts:
                expected[t] += weights[t, j] * outputs[used.index(expert), t]
    outputs[len(used) :] = np.nan
    outputs[:, 2] = np.nan  # no token reads the row of another, nor one without experts any
    out = jnp.asarray(outputs, jnp.float32)
    close(sum_places(out, places, routing.weights, jnp.float32, interpret=True), expected, 1e-6)


@pytest.mark.parametrize(("rows", "n", "k"), [(3, 2500, 10), (1, 700, 1), (2, 1024, 3)])
def test_most_probable_tokens_and_their_order(rows: int, n: int, k: int) -> None:
    logits = np.round(np.random.default_rng(0).normal(size=(rows, n)) * 4) / 4  # equals among them, across parts too
    logits[0, :2] = -np.inf
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    best, ids = fused_most_probable(jnp.asarray(logits, jnp.float32), k, interpret=True)
    np.testing.assert_array_equal(np.asarray(ids), order)
    close(best, np.take_along_axis(scores, order, axis=1), 1e-6)


def test_tokens_differ_and_probabilities_are_at_most_1_for_any_logits() -> None:
    logits = jnp.full((3, 1500), -jnp.inf).at[0].set(jnp.nan).at[1, 7].set(0.0).at[2].set(100.0)
    best, ids = fused_most_probable(logits, 4, interpret=True)
    assert all(len(set(row)) == 4 and 0 <= min(row) <= max(row) < 1500 for row in ids.tolist())
    assert ids[1, 0] == 7 and ids[2].tolist() == [0, 1, 2, 3] and (np.asarray(best) <= 0).all()
    assert best[1, 0] == 0 and not np.signbit(np.asarray(best)[1, 0])


@pytest.mark.parametrize("credit", EXPERT_WEIGHTS)
@pytest.mark.parametrize(("rows", "experts", "k", "most"), [(5, 12, 3, 4), (1, 20, 2, 2), (9, 16, 2, 7)])
@pytest.mark.parametrize("normalised", [False, True])
def test_routing_under_a_budget(credit: str, rows: int, experts: int, k: int, most: int, normalised: bool) -> None:
    """Against the rule in plain operations, which `test_budget.py` holds against Python."""
    config = dataclasses.replace(CONFIG, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=normalised)
    logits = normal(0, rows, experts, dtype=jnp.float32)
    valid = jnp.arange(rows) != 3
    natural, probabilities = route(config, jnp.eye(experts), logits, valid)
    budget = BudgetConfig((most, most + 1), score="path", credit=credit)
    nodes = Nodes(
        jnp.exp(-jnp.arange(rows, dtype=jnp.float32))[None],
        jnp.arange(rows, dtype=jnp.int32)[None],
        jnp.tri(rows, dtype=bool)[None],
        jnp.ones((rows,)),
    )
    arguments = (budget, nodes, normalised, 0, probabilities, natural, valid)

    def interpreted(plain: Any, *arguments: Any) -> Any:
        return fused_shortlist(*arguments, interpret=True)

    expected, got = restrict(*arguments), restrict(*arguments, shortlist=interpreted)
    np.testing.assert_array_equal(np.asarray(got.shortlist), np.asarray(expected.shortlist))
    np.testing.assert_array_equal(np.asarray(got.routing.experts), np.asarray(expected.routing.experts))
    np.testing.assert_array_equal(np.asarray(got.replaced), np.asarray(expected.replaced))
    close(got.routing.weights, expected.routing.weights, 1e-6)
    close(got.mass_kept, expected.mass_kept, 1e-6)
    assert got.routing.max_distinct == most + 1 and (np.asarray(got.kept) == np.asarray(valid)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"anchor": "root"}, {"coverage": "truncate"}, {"size": "mass", "mass": 0.5}, {"groups": 2},
        {"min_kept_weight": 0.5}, {"credit": lambda probabilities, selected, weights: weights},
    ],
)  # fmt: skip
def test_other_rules_of_a_budget_run_in_plain_operations(change: dict[str, Any]) -> None:
    assert BudgetConfig(4).by_score_alone and not BudgetConfig(4, **change).by_score_alone


def test_rows_of_the_cache_are_all_read_before_one_is_written() -> None:
    stores = tuple(normal(i, 2, 3, 32, 24) for i in range(3))
    start, rows = [3, 20], [[0, 2, 5, 0], [1, 0, 7, 8]]
    got = move_rows(stores, jnp.asarray(start, jnp.int32), jnp.asarray(rows, jnp.int32), interpret=True)
    for old, new in zip(stores, got, strict=True):
        expected = np.asarray(old).copy()
        for b in range(2):
            expected[b, :, start[b] : start[b] + 4] = np.asarray(old)[b][:, start[b] + np.asarray(rows[b])]
        np.testing.assert_array_equal(np.asarray(new), expected)


def launches(
    dtype: Any = jnp.bfloat16, tokens: int = 3, head: int = 64, changed: dict[str, Any] | None = None, **forms: Any
) -> int:
    """Kernels of Triton in a forward pass of one layer, lowered for an A100."""
    changes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": head, "num_hidden_layers": 1}
    config, backend = read_config(tiny.CONFIG | changes), BACKENDS["fused"]._replace(**forms)
    config = dataclasses.replace(config, **changed or {})
    params = abstract_decoder(config, backend, dtype)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 128, dtype, stacked=False))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, tokens, 128), jnp.bool_)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        run = jax.jit(lambda *a: forward(config, *a, backend)[:2])
        text = run.trace(params, ids, ids, mask, cache).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("xla.gpu.triton")


def test_every_form_can_be_turned_off() -> None:
    kernels = {"attention": 2, "write_qkv": 1, "add_norm": 3, "route": 1}
    assert launches() == sum(kernels.values()) + 4  # of the experts: list, two products, sum
    for form, count in kernels.items():
        assert launches(**{form: getattr(PLAIN, form)}) == launches() - count


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"tokens": 1}, 9, id="one token needs neither list nor sum"),
        pytest.param({"tokens": 65}, 3, id="a prompt: products of experts, router"),
        pytest.param({"dtype": jnp.float32}, 4, id="float32: norms and router"),
        pytest.param({"head": 32}, 9, id="a narrow head: all but attention"),
        pytest.param({"changed": {"qk_norm": "unit"}}, 10, id="norms of rotated heads: all but write_qkv"),
        pytest.param({"changed": {"layer_norms": True}}, 8, id="norms with a bias: all but norms"),
        pytest.param({"changed": {"router": RouterConfig("sparsemixer")}}, 10, id="sparsemixer: all but the router"),
        pytest.param({"changed": {"input_norms": False}}, 9, id="no norms of inputs: one norm instead of three"),
    ],
)
def test_what_does_not_fit_runs_in_plain_operations(change: dict[str, Any], expected: int) -> None:
    assert launches(**change) == expected


@pytest.mark.slow
def test_the_script_for_a_card_finds_every_kernel_right_and_goes_on_where_one_fails() -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 64, "num_experts": 16}
    config = read_config(tiny.CONFIG | sizes)
    errors = {case.name: error_of(case) for case in cases_of(config, 3, interpret=True)}
    wrong = {name: error for name, error in errors.items() if isinstance(error, str) or not error <= TOLERANCE}
    assert len(errors) == 8 + 1 + len(QUANTIZATIONS) and wrong == {}

    def fails(x: jax.Array) -> jax.Array:
        raise NotImplementedError("not lowered")

    assert error_of(Case("none", fails, fails, (jnp.ones(3),))) == "NotImplementedError: not lowered"
    assert error_of(Case("wrong", jnp.sin, jnp.cos, (jnp.ones(3),))) > TOLERANCE
