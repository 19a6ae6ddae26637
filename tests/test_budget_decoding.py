"""Budgeted decoding as a whole: against a slow reference; bit for bit without a limit; blind to what is not read."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled_law
import slow_decoder
import test_speculate
from driver import build, fast_jit
from speculation import Decoding, FastPrograms, decode, draft_config, plainly, small_head, speculating
from tiny import CONFIG, tiny_tensors

from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.round_info import RoundInfo
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.measure.teacher_forcing import restrict_each
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.run import Batch, Run

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=16, norm_topk_prob=False, clip_qkv=8.0),
    "qwen3_moe": {},
    "mixtral": dict(intermediate_size=16, num_local_experts=8, sliding_window=None),
}
# The root and most of the vocabulary as its children: even a random head is right now and then.
WIDE = TreeConfig(1, 14, 18)
PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 6] * 10]
TIGHT = BudgetConfig(0.25)


@cache
def parts(family: str, backend: str = "switch") -> tuple[Any, ...]:
    """A tiny target of 8 experts, 2 for each token, and a head for it."""
    fields = CONFIG | dict(
        model_type=family, vocab_size=16, head_dim=8, max_position_embeddings=2048, num_experts=8, num_experts_per_tok=2
    )
    fields |= FAMILIES[family]
    config = read_config(fields)
    params = build(config, tiny_tensors(fields), BACKENDS[backend])
    draft = draft_config(config, draft_vocab_size=16, boundaries=(0, 1, 2))
    return config, params, BACKENDS[backend], draft, small_head(draft, params)


def budgeted(
    family: str,
    rule: BudgetConfig | None,
    tree: TreeConfig = WIDE,
    backend: str = "switch",
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, frozen
) -> Decoding:
    config, params, form, draft, head = parts(family, backend)
    method, both = speculating(config, params, form, draft, head, tree, sampling)
    return Decoding(dataclasses.replace(method, budget=None if rule is None else resolve(rule, config)), both)


@pytest.mark.slow_except("mixtral-0.5-substitute")
@pytest.mark.parametrize("coverage", ["substitute", "truncate"])
@pytest.mark.parametrize("experts", [0.5, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_that_of_a_slow_decoder_that_obeys_the_budget(family: str, experts: float, coverage: str) -> None:
    """More than 200 tokens: every round's tree is verified by the slow decoder from a cache of its own."""
    rule, new, rounds = BudgetConfig(experts, coverage, "probability", "all"), 210, list[RoundInfo]()
    config, params, *_ = parts(family)
    run = Run(FastPrograms(), *budgeted(family, rule), Batch(PROMPTS[:1], [len(PROMPTS[0]) + new], (), 0))
    run.execute(on_round=lambda number, info: rounds.append(info))
    slow, text = slow_decoder.SlowDecoder(config, params), list(PROMPTS[0])
    logits, left = slow.read(text, slow_decoder.chain(len(text)))
    slow.keep(left, range(len(text)))
    text.append(int(logits[-1].argmax()))
    for info in rounds:
        assert info.tree is not None
        tokens, parents, scores = (part[0].tolist() for part in info.tree)
        assert tokens[0] == text[-1]
        rows = slow_decoder.tree_rows(parents, scores)
        logits, left = slow.read(tokens, parents, resolve(rule, config), rows)
        path = walk(tokens, parents, logits)
        slow.keep(left, path)
        text += [tokens[n] for n in path[1:]] + [int(logits[path[-1]].argmax())]
    assert run.sequences[0] == text[: len(PROMPTS[0]) + new] and len(text) >= len(PROMPTS[0]) + new
    assert run.accepted.sum() > 10  # a loop that never accepts proves little
    assert run.sums["experts_read"] < run.sums["experts_wanted"] and run.sums["replaced"] > 0


def walk(tokens: list[int], parents: list[int], logits: np.ndarray) -> list[int]:
    """Greedy acceptance."""
    path = [0]
    while True:
        best = int(logits[path[-1]].argmax())
        found = [n for n in range(len(tokens)) if parents[n] == path[-1] and tokens[n] == best]
        if not found:
            return path
        path.append(found[0])


@pytest.mark.slow_except("slots-0.0")
@pytest.mark.parametrize(
    ("backend", "temperature"), [("switch", 0.0), ("switch", 0.9), ("slots", 0.0), ("pallas", 0.0)]
)
def test_a_budget_of_all_experts_changes_no_bit(backend: str, temperature: float) -> None:
    programs, caches, sampling = FastPrograms(), [], SamplingConfig(temperature)
    for rule in (None, BudgetConfig(1.0)):
        decoding = budgeted("qwen3_moe", rule, backend=backend, sampling=sampling)
        state = Run(programs, *decoding, Batch(PROMPTS, [len(p) + 40 for p in PROMPTS], (), 0)).state_after(6)
        caches.append((state.decoding.tokens, state.decoding.cache, state.draft.aux))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *caches)


@pytest.mark.slow_except("slots-substitute-none")
@pytest.mark.parametrize("anchor", ["none", "likely"])
@pytest.mark.parametrize("coverage", ["substitute", "truncate"])
@pytest.mark.parametrize("backend", ["switch", "slots", "pallas", "mosaic"])
def test_weights_outside_the_shortlist_are_not_read(backend: str, coverage: str, anchor: str) -> None:
    """NaN in all experts that no layer's shortlist holds: not a bit of logits, cache and hidden states may change."""
    rule = BudgetConfig(0.5, coverage=coverage, anchor=anchor, score="path", credit="hits")
    config, params, form, *_ = parts("qwen3_moe", backend)
    method, both = budgeted("qwen3_moe", rule, backend=backend)
    state = Run(FastPrograms(), method, both, Batch(PROMPTS[:1], [60], (), 0)).state_after(3)
    trees, state = fast_jit(method.propose)(both, state)
    verify = fast_jit(method.verify)
    logits, kv, info = verify(both, state, trees)
    listed = [set(router.restricted.shortlist.tolist()) for router in info.routers]
    assert all(len(layer) == 4 for layer in listed)
    poisoned = poison(params, form.layout, config.num_experts, listed)
    other, other_kv, other_info = verify(dataclasses.replace(both, target=poisoned), state, trees)
    before, after = (logits, kv, info.aux_hidden_states), (other, other_kv, other_info.aux_hidden_states)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), before, after)
    assert np.isfinite(np.asarray(logits)).all()


def poison(params: Any, layout: str, num_experts: int, keep: list[set[int]]) -> Any:
    """The same parameters with NaN in every expert of layer l that is not in `keep[l]`."""

    def spoil(layer: int, expert: int, matrix: jax.Array) -> jax.Array:
        return matrix if expert in keep[layer] else jnp.full_like(matrix, jnp.nan)

    if layout == "per_expert":
        experts = tuple(
            tuple(jax.tree.map(partial(spoil, i, e), expert) for e, expert in enumerate(layer))
            for i, layer in enumerate(params.experts)
        )
        return dataclasses.replace(params, experts=experts)
    kept = np.array([e in layer for layer in keep for e in range(num_experts)])[:, None, None]
    experts = jax.tree.map(lambda matrix: jnp.where(kept, matrix, jnp.nan), params.experts)
    return dataclasses.replace(params, experts=experts)


# Every row's own experts precede all others, and a row that loses one is pruned.
EXACT: dict[str, Any] = dict(anchor="likely", anchor_probability=0.0, min_kept_weight=1.0)


@pytest.mark.slow_except("2-substitute-0.0")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("experts", "coverage"), [(2, "substitute"), (4, "substitute"), ((2, 7), "substitute"), (4, "truncate")], ids=str
)
def test_budgets_that_prune_every_loss_are_exact(experts: Any, coverage: str, temperature: float) -> None:
    """Output is plain decoding's, greedy and sampled, whichever the number of experts."""
    rule = BudgetConfig(experts, coverage=coverage, score="path", **EXACT)
    config, params, form, *_ = parts("qwen3_moe")
    sampling = SamplingConfig(temperature)
    plain = decode(plainly(config, params, form, sampling), FastPrograms(), PROMPTS[:1], 200).sequences
    run = decode(budgeted("qwen3_moe", rule, sampling=sampling), FastPrograms(), PROMPTS[:1], 200)
    assert run.sequences == plain
    free = decode(budgeted("qwen3_moe", None, sampling=sampling), FastPrograms(), PROMPTS[:1], 200)
    assert free.rounds <= run.rounds < 199  # some drafts are accepted, if fewer
    assert run.sums["experts_read"] / run.rounds <= np.mean(resolve(rule, config).experts)


@pytest.mark.slow
def test_budgets_that_prune_every_loss_are_exact_in_distribution_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a budget (`test_speculate.py`): three tokens against enumerated probabilities, every tree under a
    budget of its own, of half the experts."""
    sampled_law.just_enough_room(monkeypatch)
    sampling, tiny = SamplingConfig(2.0), test_speculate.pair(vocab_size=7)
    method, params = speculating(*tiny, TreeConfig(1, 2, 5), sampling)
    rule, each = resolve(BudgetConfig(0.5, **EXACT), tiny[0]), partial(restrict_each, jnp.int32(2))
    decoding = Decoding(dataclasses.replace(method, budget=rule, restrict=each), params)
    assert sampled_law.check(tiny[:3], decoding, sampling, PROMPTS[0], seeds=12) > 0
    assert decode(decoding, FastPrograms(), PROMPTS[:1] * 64, 3).sums["replaced"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("size", ["mass", "rank"])
def test_sizes_that_follow_the_text_read_no_more_than_the_budget(size: str) -> None:
    rounds: list[RoundInfo] = []
    rule = BudgetConfig(6, size=size, mass=0.6, credit="all")
    run = Run(FastPrograms(), *budgeted("qwen3_moe", rule), Batch(PROMPTS, [len(p) + 60 for p in PROMPTS], (), 0))
    run.execute(on_round=lambda number, info: rounds.append(info))
    lists = [layer for info in rounds for layer in info.budget.shortlist]  # pyright: ignore[reportOptionalMemberAccess]
    lengths = {int((layer < 8).sum()) for layer in lists}
    assert min(lengths) >= 2 and max(lengths) <= 6 and len(lengths) > 1
    for info in rounds:
        assert info.budget is not None
        for layer, shortlist in enumerate(info.budget.shortlist):
            assert set(np.flatnonzero(info.read[layer].any(axis=0))) <= set(shortlist.tolist())


@pytest.mark.slow
def test_only_verification_is_budgeted() -> None:
    """Prefill is the same program as without a budget, and the first token is its."""
    with_, without = budgeted("olmoe", TIGHT), budgeted("olmoe", None)
    assert with_.method.prefill == without.method.prefill and with_.method != without.method
    programs = FastPrograms()
    for decoding in (with_, without):
        decode(decoding, programs, PROMPTS, 20)
    assert programs.traces["DraftedPrefill.read"] == 1 and programs.traces["Speculative.step"] == 2


@pytest.mark.slow
def test_a_batch_shares_one_shortlist() -> None:
    """Scores are summed over all sequences that are not done, whose rows alone are routed."""
    rounds: list[RoundInfo] = []
    limits = [len(p) + n for p, n in zip(PROMPTS, (5, 40, 40), strict=True)]
    run = Run(FastPrograms(), *budgeted("qwen3_moe", TIGHT), Batch(PROMPTS, limits, (), 0))
    run.execute(on_round=lambda number, info: rounds.append(info))
    assert not rounds[-1].active[0] and not rounds[-1].read[:, 0].any()
    for info in rounds:
        assert info.read.any(axis=1).sum(axis=1).max() <= 2
