"""Decoding with DFlash and DSpark heads: the text is plain decoding's with any drafts, and the context's rows
are those of the committed tokens."""

import dataclasses
from functools import cache
from typing import Any

import dflash_oracle as oracle
import jax.numpy as jnp
import numpy as np
import pytest
from dflash_oracle import VARIANTS
from driver import fast_jit
from speculation import GREEDY, Decoding, FastPrograms, decode
from test_menu import every_shape_first
from test_speculate import PROMPTS, every_family, pair, plain_tokens, rows_of, states_after

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.dflash_drafter import DFlashDrafter
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import forward
from moespec_jax.nn.dflash import DFlashHead, MarkovBias, extend_context, fuse_context
from moespec_jax.runtime.run import Batch, Run

NEW = 100
variants = pytest.mark.parametrize("variant", ["base", "windows", "vanilla"])


@cache
def block_head(family: str, variant: str) -> tuple[DFlashConfig, DFlashHead]:
    """A random head for the tiny target of a family, of whose output matrix it drafts. A Markov bias knows which token
    follows which in plain decoding's text, so that whole blocks are accepted too."""
    target, params = pair(family)[:2]
    fields = VARIANTS[variant] | {"boundaries": (0, 1, 2)}
    if variant == "vanilla":
        fields["markov_rank"] = target.vocab_size
    config = oracle.config_for(target, **fields)
    head = oracle.head_of(config)
    assert params.lm_head is not None and head.target_ids is not None
    if variant == "vanilla":
        followers = np.zeros((target.vocab_size, target.vocab_size), np.float32)
        for sequence in plain_tokens(family, "switch", NEW):
            np.add.at(followers, (sequence[1:], sequence[:-1]), 1.0)
        share = followers / np.maximum(followers.max(axis=0, keepdims=True), 1.0)
        bias = MarkovBias(jnp.eye(target.vocab_size), 9.0 * jnp.asarray(share)[head.target_ids])
        head = dataclasses.replace(head, markov=bias)
    return config, dataclasses.replace(head, lm_head=params.lm_head[head.target_ids])


def drafting(
    family: str,
    variant: str,
    sampling: SamplingConfig = GREEDY,
    tree: TreeConfig | None = None,
    backend: str = "switch",
    budget: BudgetConfig | None = None,
) -> Decoding:
    """Speculative decoding with a random head; by default of the whole block."""
    target, params, form, *_ = pair(family, backend)
    config, head = block_head(family, variant)
    tree = tree or config.whole_block
    accept = accept_rule(sampling, tree.longest_path)
    method: Speculative[DFlashHead, HeadState] = Speculative(
        Autoregressive(target, sampling, form), DFlashDrafter(config), tree, accept, budget
    )
    return Decoding(method, SpeculativeParams(params, head))


@pytest.mark.slow_except("0.8-vanilla-olmoe")
@every_family
@variants
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_plain_decoding_s(family: str, variant: str, temperature: float) -> None:
    """Three sequences that progress at their own speed, and the first alone, as it is the first in both batches."""
    sampling, programs = SamplingConfig(temperature, 12, 0.95) if temperature else GREEDY, FastPrograms()
    plain = plain_tokens(family, "switch", NEW, sampling)
    decoding = drafting(family, variant, sampling)
    run = decode(decoding, programs, PROMPTS, NEW)
    assert run.sequences == plain and run.accepted[:, 0].any()
    assert variant != "vanilla" or (run.accepted.sum() > 50 and run.accepted[:, 2].any())
    assert programs.traces == {"DraftedPrefill.read": 1, "Speculative.begin": 1, "Speculative.step": 1}
    assert decode(decoding, programs, PROMPTS[:1], NEW).sequences == plain[:1]


@pytest.mark.slow
def test_so_it_is_with_stacked_layers_and_for_a_part_of_the_block() -> None:
    plain = plain_tokens("qwen3_moe", "slots", NEW)
    for tree in (None, TreeConfig(0, 1, 2), TreeConfig(2, 1, 3)):
        run = decode(drafting("qwen3_moe", "vanilla", tree=tree, backend="slots"), FastPrograms(), PROMPTS, NEW)
        assert run.sequences == plain


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_so_it_is_where_rounds_have_different_shapes(temperature: float) -> None:
    """A menu of plain decoding and two chains."""
    sampling, trees = SamplingConfig(temperature), (TreeConfig(1, 1, 3), TreeConfig(3, 1, 5))
    decodings = [drafting("qwen3_moe", "vanilla", sampling, tree) for tree in trees]
    menu = Menu(tuple(decoding.method for decoding in decodings))
    run = Run(FastPrograms(), menu, decodings[0].params, Batch(PROMPTS, [len(p) + 60 for p in PROMPTS], (), 0))
    run.execute(prepare=every_shape_first)
    assert run.sequences == plain_tokens("qwen3_moe", "switch", 60, sampling) and min(run.rounds_of) >= 4


@pytest.mark.slow
def test_the_context_is_what_the_committed_tokens_give() -> None:
    """After a few rounds, every confirmed row, from the committed tokens alone."""
    target, params, form, *_ = pair()
    config, head = block_head("qwen3_moe", "vanilla")

    @fast_jit
    def fresh(ids: Any) -> Any:
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
        empty = empty_cache(target, 1, ids.shape[1], jnp.float32, stacked=form.stacked)
        mask = causal_mask(positions, ids.shape[1])
        info = forward(target, params, ids, positions, mask, empty, form, boundaries=config.boundaries)[2]
        assert info.aux_hidden_states is not None
        rows = fuse_context(config, head, info.aux_hidden_states)
        return extend_context(
            config, head, rows, positions, empty_cache(config, 1, ids.shape[1], jnp.float32, stacked=False)
        )

    for state in states_after(drafting("qwen3_moe", "vanilla"), (0, 9)):
        tokens, confirmed = np.asarray(state.decoding.tokens), np.asarray(state.draft.cache.length)
        for b in range(3):
            expected = rows_of(fresh(jnp.asarray(tokens[b : b + 1, :128])), 0, int(confirmed[b]))
            # Sums in another order, of values around 1.
            np.testing.assert_allclose(rows_of(state.draft.cache, b, int(confirmed[b])), expected, atol=2e-5)


@pytest.mark.slow
def test_budgets_weigh_rows_by_the_confidence_head() -> None:
    """Under a budget by path probability, the text depends on the estimates; without one it does not."""
    target = pair()[0]
    budget = resolve(BudgetConfig(2, score="path"), target)
    config, head = block_head("qwen3_moe", "vanilla")
    doubtful = head.replace(confidence=head.confidence.replace(bias=jnp.full((1,), -9.0)))  # pyright: ignore
    texts = []
    for limit in (budget, None):
        decoding = drafting("qwen3_moe", "vanilla", budget=limit)
        for changed in (head, doubtful):
            params = SpeculativeParams(decoding.params.target, changed)
            texts.append(decode(Decoding(decoding.method, params), FastPrograms(), PROMPTS, NEW).sequences)
    assert texts[0] != texts[1] and texts[2] == texts[3] == plain_tokens("qwen3_moe", "switch", NEW)
    assert config.confidence == "hidden and markov"
