"""Every drafter, with drafts that share the noise of the target's draws and with greedy ones: sampled output has the
target's distribution, and with a seed it is plain decoding's, token for token."""

import dataclasses
from functools import cache
from typing import Any

import dflash_oracle
import numpy as np
import pytest
import sampled_law
from speculation import Decoding, FastPrograms, decode, plainly
from test_dflash_decoding import block_head
from test_speculate import PROMPTS, pair

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.dflash_drafter import DFlashDrafter
from moespec_jax.decoding.drafter import Drafter, SpeculationState, SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.ngram_drafter import NgramDrafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.self_drafter import SelfDrafter
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.tree import Tree

BLOCKS = {"DFlash": {}, "DSpark": dflash_oracle.DSPARK | dict(markov="vanilla")}
DRAFTERS = ["EAGLE-3", *BLOCKS, "self:1"]
NEW = 60


class GreedyDrafts:
    """A drafter that drafts for greedy decoding, however the target's tokens are drawn."""

    def propose(self, tree: TreeConfig, params: Any, state: Any) -> tuple[Tree, SpeculationState[Any]]:
        greedy = dataclasses.replace(state, sampling=SamplingConfig())
        trees, after = super().propose(tree, params, greedy)  # pyright: ignore[reportAttributeAccessIssue]
        return trees, dataclasses.replace(after, sampling=state.sampling)


GREEDY = {kind: type(f"Greedy{kind.__name__}", (GreedyDrafts, kind), {})
          for kind in (Eagle3Drafter, DFlashDrafter, SelfDrafter)}  # fmt: skip
every_draft = pytest.mark.parametrize(
    ("name", "drafts"), [*((name, kind) for name in DRAFTERS for kind in ("sampled", "greedy")), ("ngram", "looked up")]
)


@cache
def drafter(name: str, vocab_size: int) -> tuple[Drafter[Any, Any], Any]:
    """A drafter and its random parameters, for the tiny target of `vocab_size` tokens."""
    target, params, form, draft, head = pair(vocab_size=vocab_size)
    if name == "EAGLE-3":
        return Eagle3Drafter(draft), head
    if name == "self:1":
        return SelfDrafter(target, form, 1), ()
    if name == "ngram":
        return NgramDrafter(4), ()
    if vocab_size == 16:
        config, block = block_head("qwen3_moe", {"DFlash": "base", "DSpark": "vanilla"}[name])
        return DFlashDrafter(config), block
    fields = BLOCKS[name] | dict(boundaries=(0, 1, 2), draft_vocab_size=draft.draft_vocab_size)
    config = dflash_oracle.config_for(target, **fields)
    block = dflash_oracle.head_of(config)
    assert params.lm_head is not None and block.target_ids is not None
    return DFlashDrafter(config), dataclasses.replace(block, lm_head=params.lm_head[block.target_ids])


def drafting(name: str, drafts: str, sampling: SamplingConfig, tree: TreeConfig, vocab_size: int = 16) -> Decoding:
    target, params, form, *_ = pair(vocab_size=vocab_size)
    own, weights = drafter(name, vocab_size)
    if drafts == "greedy":
        own = GREEDY[type(own)](*(getattr(own, field.name) for field in dataclasses.fields(own)))  # pyright: ignore
    plain, accept = Autoregressive(target, sampling, form), accept_rule(sampling, tree.longest_path)
    return Decoding(Speculative(plain, own, tree, accept), SpeculativeParams(params, weights))


@pytest.mark.slow
@every_draft
@pytest.mark.parametrize("sampling", [SamplingConfig(2.0), SamplingConfig(2.0, 5, 0.9)], ids=["whole", "top-k top-p"])
def test_sampled_output_is_distributed_as_the_target_says(
    name: str, drafts: str, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens of the whole loop against enumerated probabilities; two of them are drafted in one round."""
    sampled_law.just_enough_room(monkeypatch)
    decoding = drafting(name, drafts, sampling, TreeConfig(1, 1, 3), vocab_size=7)
    prompt = [1, 2, 3, 1, 2, 3, 1]
    accepted = sampled_law.check(pair(vocab_size=7)[:3], decoding, sampling, prompt, seeds=8)
    assert accepted > sampled_law.ROWS / 100


@pytest.mark.slow
@every_draft
def test_a_seed_gives_plain_decoding_s_tokens(name: str, drafts: str) -> None:
    """Three sequences, and each of them alone."""
    sampling, programs = SamplingConfig(0.9, 12, 0.95), FastPrograms()
    decoding, plain = drafting(name, drafts, sampling, TreeConfig(2, 1, 4)), plainly(*pair()[:3], sampling)
    for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS)):
        run = decode(decoding, programs, prompts, NEW, seed=3)
        assert run.sequences == decode(plain, programs, prompts, NEW, seed=3).sequences
        assert len(prompts) < 3 or run.accepted.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_drafts_are_others(name: str) -> None:
    """Texts are equal; which tokens a round drafts differs, and so does where rounds begin."""
    runs = [
        decode(drafting(name, drafts, SamplingConfig(1.0), TreeConfig(2, 1, 4)), FastPrograms(), PROMPTS, NEW)
        for drafts in ("sampled", "greedy")
    ]
    assert runs[0].sequences == runs[1].sequences
    assert runs[0].rounds != runs[1].rounds or not np.array_equal(runs[0].accepted, runs[1].accepted)
