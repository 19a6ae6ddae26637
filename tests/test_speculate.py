"""Laws of the speculative loop: what comes out is what plain decoding gives, and what stays in the caches is what a
fresh prefill would have put there."""

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled_law
from driver import build, fast_jit
from speculation import GREEDY, Decoding, FastPrograms, decode, draft_config, plainly, small_head, speculating
from tiny import CONFIG, tiny_tensors

from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter, extend_cache
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.cache import Cache, empty_cache
from moespec_jax.nn.decoder import Decoder, forward
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.runtime.run import Batch, Run

Pair = tuple[DecoderConfig, Decoder, Backend, DraftConfig, DraftHead]

FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=16, norm_topk_prob=False, clip_qkv=8.0),
    "qwen3_moe": {},
    "qwen2_moe": dict(
        shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "mixtral": dict(intermediate_size=16, num_local_experts=4, sliding_window=None),
}
EAGLE, SMALL, CHAIN = TreeConfig(7, 10, 60), TreeConfig(4, 4, 16), TreeConfig(2, 1, 4)
TREES = {"60/7/10": EAGLE, "16/4/4": SMALL, "chain of 4": CHAIN}
PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 6] * 10]
both_backends = pytest.mark.parametrize("backend", ["switch", "slots"])
every_family = pytest.mark.parametrize("family", FAMILY_FIELDS)


@cache
def pair(family: str = "qwen3_moe", backend: str = "switch", vocab_size: int = 16) -> Pair:
    """A tiny target of a family and a random head for it."""
    fields = CONFIG | dict(
        model_type=family, vocab_size=vocab_size, head_dim=8, max_position_embeddings=2048, tie_word_embeddings=False
    )
    fields |= FAMILY_FIELDS[family]
    config = read_config(fields)
    params = build(config, tiny_tensors(fields), BACKENDS[backend])
    draft = draft_config(config, draft_vocab_size=max(vocab_size - 4, 5), boundaries=(0, 1, 2))
    return config, params, BACKENDS[backend], draft, small_head(draft, params)


@cache
def plain_tokens(family: str, backend: str, new: int, sampling: SamplingConfig = GREEDY) -> list[list[int]]:
    return decode(plainly(*pair(family, backend)[:3], sampling), FastPrograms(), PROMPTS, new).sequences


@pytest.mark.slow_except("16/4/4-olmoe")
@every_family
@pytest.mark.parametrize("tree", TREES)
def test_greedy_output_is_plain_decoding_s(family: str, tree: str) -> None:
    """More than 1,000 tokens a family and tree, three sequences that progress at their own speed."""
    new, programs = 340, FastPrograms()
    run = decode(speculating(*pair(family), TREES[tree]), programs, PROMPTS, new)
    assert run.sequences == plain_tokens(family, "switch", new)
    assert run.accepted.sum() > 20 and run.accepted[:, 1].any()  # a loop that never accepts proves little
    assert programs.traces == {"DraftedPrefill.read": 1, "Speculative.begin": 1, "Speculative.step": 1}


@pytest.mark.slow
@pytest.mark.parametrize("tree", TREES)
def test_so_it_is_with_stacked_layers_and_for_one_sequence(tree: str) -> None:
    three = decode(speculating(*pair(backend="slots"), TREES[tree]), FastPrograms(), PROMPTS, 120).sequences
    assert three == plain_tokens("qwen3_moe", "slots", 120)
    for prompt, sequence in zip(PROMPTS[:1], three[:1], strict=True):
        alone = decode(speculating(*pair(backend="slots"), TREES[tree]), FastPrograms(), [prompt], 120).sequences
        assert alone == [sequence]


@pytest.mark.slow
def test_unrolled_levels_draft_the_same_trees() -> None:
    """GPUs unroll them (`Backend.unrolled`)."""
    looped = speculating(*pair(), TREES["16/4/4"])
    drafter = Eagle3Drafter(pair()[3], pair()[2]._replace(unrolled=True))
    unrolled = looped._replace(method=dataclasses.replace(looped.method, drafter=drafter))
    one, other = (decode(decoding, FastPrograms(), PROMPTS, 60) for decoding in (looped, unrolled))
    assert one.sequences == other.sequences
    np.testing.assert_array_equal(one.accepted, other.accepted)


@pytest.mark.slow
@pytest.mark.parametrize("tree", [TreeConfig(0, 1, 2), TreeConfig(0, 4, 3), TreeConfig(1, 3, 13)], ids=str)
def test_so_it_is_for_the_smallest_trees(tree: TreeConfig) -> None:
    run = decode(speculating(*pair(), tree), FastPrograms(), PROMPTS, 60)
    assert run.sequences == [
        s[: len(p) + 60] for s, p in zip(plain_tokens("qwen3_moe", "switch", 340), PROMPTS, strict=True)
    ]


@pytest.mark.slow
def test_rotary_scaling_that_follows_the_length_is_plain_decoding_s() -> None:
    """Dynamic scaling beyond the trained context: every node turns as it would in a pass of its own."""
    fields = CONFIG | dict(vocab_size=16, max_position_embeddings=24)
    fields["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0}
    config = read_config(fields)
    params = build(config, tiny_tensors(fields), BACKENDS["switch"])
    draft = draft_config(config, draft_vocab_size=12, boundaries=(0, 1, 2))
    chain = speculating(config, params, BACKENDS["switch"], draft, small_head(draft, params), SMALL)
    plain = plainly(config, params, BACKENDS["switch"])
    drafted, alone = (decode(way, FastPrograms(), PROMPTS, 100) for way in (chain, plain))
    assert drafted.sequences == alone.sequences and drafted.accepted.sum() > 10


def test_stop_ids_and_limits_cut_where_plain_decoding_stops() -> None:
    """Every token of a plain run in turn as stop id, and every limit from 1 to 9, in one batch each."""
    programs, speculative = FastPrograms(), speculating(*pair(), SMALL)
    plain = plain_tokens("qwen3_moe", "switch", 340)
    for position in range(12, 30):
        stops = (plain[0][position],)
        expected = decode(plainly(*pair()[:3]), programs, PROMPTS, 40, stops).sequences
        assert decode(speculative, programs, PROMPTS, 40, stops).sequences == expected
    for limit in range(1, 10):
        batch = Batch(PROMPTS, [len(p) + limit + i for i, p in enumerate(PROMPTS)], (), 0)
        run = Run(programs, *speculative, batch)
        run.execute()
        assert run.sequences == [s[:n] for s, n in zip(plain, batch.limit, strict=True)]
    assert programs.traces["Speculative.step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.9, 12, 0.95)], ids=["greedy", "sampled"])
def test_streaming_changes_no_token(sampling: SamplingConfig) -> None:
    decoding, programs = speculating(*pair(), SMALL, sampling), FastPrograms()
    whole = plain_tokens("qwen3_moe", "switch", 50, sampling)
    run = Run(programs, *decoding, Batch(PROMPTS, [len(p) + 50 for p in PROMPTS], (), 0))
    pieces: list[list[list[int]]] = []
    run.execute(on_tokens=pieces.append, on_round=lambda number, info: None)
    assert run.sequences == whole
    assert [sum((piece[b] for piece in pieces), p) for b, p in enumerate(PROMPTS)] == whole
    assert programs.traces["Speculative.step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("tree", [TreeConfig(1, 2, 5), TreeConfig(1, 1, 3)], ids=["tree", "chain"])
@pytest.mark.parametrize("sampling", [SamplingConfig(2.0), SamplingConfig(2.0, 5, 0.9)], ids=["whole", "top-k top-p"])
def test_sampled_output_is_distributed_as_the_target_says(
    tree: TreeConfig, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled_law.just_enough_room(monkeypatch)
    tiny = pair(vocab_size=7)
    accepted = sampled_law.check(tiny[:3], speculating(*tiny, tree, sampling), sampling, PROMPTS[0], seeds=16)
    assert accepted > sampled_law.ROWS / 100  # the one guess of a chain is seldom right; the law holds all the same


def states_after(decoding: Decoding, rounds: Iterable[int]) -> list[SpeculationState[Any]]:
    """The state of a batch after so many rounds."""
    found: list[SpeculationState[Any]] = []

    class Watching(FastPrograms):
        def run(self, function: Any, settings: Any, params: Any, *arguments: Any, **options: Any) -> Any:
            out = super().run(function, settings, params, *arguments)
            if function.__qualname__ == "Speculative.step":
                found.append(out[0])
            return out

    run = Run(Watching(), *decoding, Batch(PROMPTS, [len(p) + 60 for p in PROMPTS], (), 0))
    run.execute(on_round=lambda number, info: None)
    return [found[i] for i in rounds]


def rows_of(cache: Cache, sequence: int, count: int) -> np.ndarray:
    """Keys and values of the first `count` slots of a sequence, all layers."""
    stores = [np.asarray(part) for part in jax.tree.leaves((cache.k, cache.v))]
    return np.stack([s[..., sequence, :, :count, :].reshape(-1, count, s.shape[-1]) for s in stores])


@pytest.mark.slow_except("chain of 4-slots")
@both_backends
@pytest.mark.parametrize("tree", ["16/4/4", "chain of 4"])
def test_caches_are_what_a_fresh_prefill_writes(backend: str, tree: str) -> None:
    """Target and head, after a few rounds: every committed row, from the committed tokens alone."""
    config, params, form, draft, head = pair(backend=backend)

    def prefill(params: Decoder, ids: jax.Array) -> tuple[Cache, Cache]:
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
        cache = empty_cache(config, 1, ids.shape[1], jnp.float32, stacked=form.stacked)
        mask = causal_mask(positions, ids.shape[1])
        _, cache, info = forward(config, params, ids, positions, mask, cache, form, boundaries=draft.boundaries)
        pairs = empty_cache(draft, 1, ids.shape[1], jnp.float32, stacked=False)
        following = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
        assert cache is not None and info.aux_hidden_states is not None
        both = SpeculativeParams(params, head)
        return cache, extend_cache(draft, both, info.aux_hidden_states, following, pairs)[1]

    fresh = fast_jit(prefill)
    for state in states_after(speculating(*pair(backend=backend), TREES[tree]), (0, 3, 9)):
        tokens, lengths = np.asarray(state.decoding.tokens), np.asarray(state.decoding.length)
        for b, length in enumerate(lengths.tolist()):
            target, pairs = fresh(params, jnp.asarray(tokens[b : b + 1, :128]))
            committed, confirmed = length - 1, int(state.draft.cache.length[b])
            # Sums in another order, of values around 1.
            np.testing.assert_allclose(
                rows_of(state.decoding.cache, b, committed), rows_of(target, 0, committed), atol=2e-5
            )
            np.testing.assert_allclose(
                rows_of(state.draft.cache, b, confirmed), rows_of(pairs, 0, confirmed), atol=2e-5
            )


def test_the_verifying_pass_is_a_parameter() -> None:
    """A round verifies with the forward pass that it is given."""
    (method, params), seen = speculating(*pair(), CHAIN), []

    def watching(*arguments: Any, **named: Any) -> Any:
        seen.append(arguments[2].shape)
        return forward(*arguments, **named)

    changed = Decoding(dataclasses.replace(method, target_forward=watching), params)
    assert decode(changed, FastPrograms(), PROMPTS, 40).sequences == plain_tokens("qwen3_moe", "switch", 40)
    assert seen == [(3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1.0, 2.5, 3.0])
def test_simulated_acceptance_has_the_mean_asked_for(length: float) -> None:
    run = decode(speculating(*pair(), TreeConfig(3, 2, 8), simulate=length), FastPrograms(), PROMPTS, 300)
    mean = 1 + run.accepted.sum() / run.active.sum()
    assert abs(mean - length) < 0.15  # about 360 rounds of a coin: the standard deviation is below 0.03


def test_methods_are_equal_where_their_settings_are() -> None:
    config, params, backend, draft, head = pair()
    one, other = (speculating(config, params, backend, draft, head, tree).method for tree in (CHAIN, SMALL))
    again = speculating(config, params, backend, draft, head, CHAIN).method
    assert one != other and one == again and hash(one) == hash(again)
    assert isinstance(one.target, Autoregressive)
