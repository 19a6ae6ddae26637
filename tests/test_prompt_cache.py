"""A conversation with a prompt cache: the tokens of the same prompts without one, and only new tokens are read."""

from typing import Any

import numpy as np
import pytest
from speculation import FastPrograms, plainly, speculating
from test_speculate import CHAIN, SMALL, every_family, pair

from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.prompt_cache import PromptCache
from moespec_jax.runtime.run import Batch, Run

METHODS = ["plain", "chain", "16/4/4", "menu"]
NEW = 14


@pytest.fixture(scope="module")
def model() -> Model:
    return load()


def decoding(name: str, family: str, sampling: SamplingConfig) -> Any:
    if name == "plain":
        return plainly(*pair(family)[:3], sampling)
    if name == "menu":
        small, chain = (speculating(*pair(family), tree, sampling) for tree in (SMALL, CHAIN))
        return small._replace(method=Menu((chain.method, small.method)))
    return speculating(*pair(family), {"chain": CHAIN, "16/4/4": SMALL}[name], sampling)


def turn(how: Any, programs: Any, prompts: list[list[int]], cache: PromptCache | None, stop: int) -> Run[Any, Any, Any]:
    run = Run(programs, how.method, how.params, Batch(prompts, [len(p) + NEW for p in prompts], (stop,), 3), cache)
    run.execute()
    return run


@pytest.mark.slow_except("chain-qwen3_moe")
@every_family
@pytest.mark.parametrize("name", METHODS)
def test_five_turns_give_the_tokens_of_five_whole_prompts(name: str, family: str) -> None:
    """Two sequences of unequal length; answers end at a stop id or a limit, and further turns of 3 to 17 tokens follow.
    Sampled, with one seed, so that the answers do not repeat."""
    how, programs, rng = decoding(name, family, SamplingConfig(0.8)), FastPrograms(), np.random.default_rng(0)
    cache, prompts = PromptCache(), [[1, 2, 3, 4, 5], [7, 3] * 10]
    for number in range(5):
        kept, whole = (turn(how, programs, prompts, given, stop=9) for given in (cache, None))
        assert kept.sequences == whole.sequences and whole.cached_tokens == 0
        np.testing.assert_array_equal(kept.accepted, whole.accepted)
        # At most the newest tokens of the last rounds are read again.
        assert (kept.cached_tokens > 0) == (number > 0) and kept.cached_tokens < min(map(len, prompts))
        prompts = [[*ids, *rng.integers(10, 16, rng.integers(3, 18)).tolist()] for ids in kept.sequences]


def test_a_turn_reads_little_more_than_its_own_tokens(model: Model) -> None:
    cache, ids = PromptCache(), model.encode("def fibonacci(n):")
    for number in range(3):
        result = model.generate([ids], max_new_tokens=20, ignore_eos=True, prompt_cache=cache).prompts[0]
        assert result.token_ids == model.generate([ids], max_new_tokens=20, ignore_eos=True).prompts[0].token_ids
        if number:
            assert len(ids) - 2 - 4 - 3 <= result.cached_tokens < len(ids)  # rounds of up to 4 tokens, and 3 new ones
        ids = [*ids, *result.token_ids, 1 + number, 2, 3]


def test_what_differs_is_read_again(model: Model) -> None:
    """Another beginning, another number of prompts, plain decoding after drafts, and a prompt that is shorter."""
    cache, ids = PromptCache(), model.encode("def fibonacci(n):\n    return")

    def cached(prompts: list[list[int]], **options: Any) -> int:
        result = model.generate(prompts, max_new_tokens=8, ignore_eos=True, prompt_cache=cache, **options)
        alone = model.generate(prompts, max_new_tokens=8, ignore_eos=True, **options)
        assert [p.token_ids for p in result.prompts] == [p.token_ids for p in alone.prompts]
        return result.prompts[0].cached_tokens

    assert [cached([ids]), cached([ids])] == [0, len(ids) - 1]
    assert cached([[*ids[:4], 5, *ids[5:]]]) == 3
    assert cached([ids[1:]]) == 0
    assert cached([ids, ids]) == 0
    assert cached([ids, ids[:5]]) == 4
    assert cached([ids], tree=None) == 0


@pytest.mark.filterwarnings("ignore::moespec_jax.decoding.budget_config.BudgetWarning")
def test_exact_output_never_begins_with_rows_of_a_budget_or_of_another_model(model: Model) -> None:
    cache, ids, other = PromptCache(), model.encode("def fibonacci(n):"), load()

    def cached(of: Model, **options: Any) -> int:
        return of.generate([ids], max_new_tokens=8, prompt_cache=cache, **options).prompts[0].cached_tokens

    assert [cached(model, budget=4), cached(model, budget=4)] == [0, len(ids) - 1]
    assert [cached(model), cached(model), cached(other), cached(model, budget=4)] == [0, len(ids) - 1, 0, 0]


def test_an_interrupted_run_leaves_nothing_behind(model: Model) -> None:
    cache, ids = PromptCache(), model.encode("def fibonacci(n):")
    model.generate([ids], max_new_tokens=8, prompt_cache=cache)

    def interrupt(_: list[list[int]]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([ids], max_new_tokens=8, prompt_cache=cache, on_tokens=interrupt)
    result = model.generate([ids], max_new_tokens=8, prompt_cache=cache).prompts[0]
    assert (
        result.cached_tokens == 0 and result.token_ids == model.generate([ids], max_new_tokens=8).prompts[0].token_ids
    )


@pytest.mark.slow
def test_a_conversation_outgrows_its_buffers(model: Model) -> None:
    """From 256 slots to 512: everything is read again once."""
    cache, ids, counts = PromptCache(), model.encode("def fibonacci(n):"), list[int]()
    for _ in range(3):
        result = model.generate([ids], max_new_tokens=110, ignore_eos=True, prompt_cache=cache).prompts[0]
        counts.append(result.cached_tokens)
        ids = [*ids, *result.token_ids]
    assert counts[0] == 0 and 0 in counts[1:] and max(counts) > 100
