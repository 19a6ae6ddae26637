"""Log-probabilities of tokens are those of the logits that drew them: NumPy's, in float64, of the whole text."""

import dataclasses
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from own_mesh import block_head
from slow_decoder import SlowDecoder, chain
from speculation import FastPrograms, decode, plainly, speculating
from test_speculate import CHAIN, SMALL, pair
from tiny_pair import run_json, write_pair

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import json_line
from moespec_jax.generate import main
from moespec_jax.runtime.load import load

PROMPTS, NEW, SAMPLING = [[1, 2, 3, 4, 5], [3, 6] * 4], 20, SamplingConfig(0.8, 9, repetition_penalty=1.3)


@cache
def oracle(sequence: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities `[position, vocabulary]` after each token of a text, read token by token."""
    config, params, *_ = pair()
    decoder, rows = SlowDecoder(config, params), []
    logits, _ = decoder.read(sequence, chain(len(sequence)))
    for row in logits:
        shifted = row - row.max()
        rows.append(shifted - np.log(np.exp(shifted).sum()))
    return np.array(rows)


def with_logprobs(name: str, count: int | None) -> Any:
    """A way of decoding that records so many most probable tokens."""
    if name == "plain":
        how = plainly(*pair()[:3], SAMPLING)
        return how._replace(method=dataclasses.replace(how.method, logprobs=count))
    chain, small = (speculating(*pair(), tree, SAMPLING) for tree in (CHAIN, SMALL))
    target = dataclasses.replace(small.method.target, logprobs=count)
    chain, small = (how._replace(method=dataclasses.replace(how.method, target=target)) for how in (chain, small))
    menu = small._replace(method=Menu((chain.method, small.method)))
    return {"chain": chain, "tree": small, "menu": menu}[name]


@pytest.mark.slow_except("3-plain", "3-tree")
@pytest.mark.parametrize("name", ["plain", "chain", "tree", "menu"])
@pytest.mark.parametrize("count", [0, 3, 16])
def test_they_are_of_the_raw_logits(name: str, count: int) -> None:
    """Sampled with cuts and a penalty, which they do not have; so plain and speculative decoding agree, too. With them
    the tokens are those without. One sequence ends at a stop id."""
    asked, not_asked = (decode(with_logprobs(name, n), FastPrograms(), PROMPTS, NEW, (9,)) for n in (count, None))
    assert asked.sequences == not_asked.sequences and not_asked.logprobs is None
    assert asked.logprobs is not None and asked.logprobs.top.shape[-1] == count
    for number, (prompt, sequence) in enumerate(zip(PROMPTS, asked.sequences, strict=True)):
        expected = oracle(tuple(sequence))[len(prompt) - 1 : -1]
        token, top, top_ids = (
            part[number, len(prompt) : len(sequence)] for part in dataclasses.astuple(asked.logprobs)
        )
        rows = np.arange(len(expected))
        np.testing.assert_allclose(token, expected[rows, sequence[len(prompt) :]], atol=1e-5)  # float32
        np.testing.assert_allclose(top, -np.sort(-expected, axis=-1)[:, :count], atol=1e-5)
        np.testing.assert_array_equal(top_ids, np.argsort(-expected, axis=-1)[:, :count])
    if name != "plain":
        assert asked.accepted.sum() > 5


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pair(tmp_path_factory.mktemp("pair"), 6)


@pytest.mark.usefixtures("fast_compile")
def test_the_command_and_python_give_them(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With texts of tokens by themselves; of samples, each its own; without the flag there are none."""
    argv = [*flags, "--prompt", "the cat", "--samples", "2", "--temperature", "1"]
    result, without = run_json(capsys, *argv, "--logprobs", "2"), run_json(capsys, *argv)
    assert without["logprobs_of"] is None and [prompt["logprobs"] for prompt in without["prompts"]] == [None] * 2
    assert result["logprobs_of"].startswith("the target: log-softmax of raw logits, before penalties, temperature")
    model = load(flags[1], flags[3])
    assert model.tokenizer is not None
    for prompt, plain in zip(result["prompts"], without["prompts"], strict=True):
        assert prompt["token_ids"] == plain["token_ids"] == [token["token_id"] for token in prompt["logprobs"]]
        for token in prompt["logprobs"]:
            assert token["text"] == model.tokenizer.decode([token["token_id"]], skip_special_tokens=False)
            first, second = token["top"]
            assert token["logprob"] <= first["logprob"] and second["logprob"] <= first["logprob"] <= 0
    assert result["prompts"][0]["logprobs"] != result["prompts"][1]["logprobs"]
    alone = model.generate("the cat", tree=None, max_new_tokens=6, ignore_eos=True, temperature=1.0, logprobs=2)
    for token, other in zip(alone.prompts[0].logprobs or [], result["prompts"][0]["logprobs"], strict=True):
        assert token.token_id == other["token_id"] and token.logprob == pytest.approx(other["logprob"], abs=1e-5)
    found = model.generate("the cat", max_new_tokens=6, ignore_eos=True, temperature=1.0, samples=2, logprobs=2)
    assert [[dataclasses.asdict(token) for token in prompt.logprobs or []] for prompt in found.prompts] == [
        prompt["logprobs"] for prompt in result["prompts"]
    ]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"logprob": -math.inf, "top": [{"logprob": -0.5}, {"logprob": -math.inf}]},
         '{"logprob": null, "top": [{"logprob": -0.5}, {"logprob": null}]}'),
        ([math.nan, (math.inf, 1e308)], "[null, [null, 1e+308]]"),
        ({"a": 0.1, "b": [1, True, None, "NaN"]}, '{"a": 0.1, "b": [1, true, null, "NaN"]}'),
    ],
)  # fmt: skip
def test_numbers_that_json_does_not_have_are_null(value: Any, line: str) -> None:
    assert json_line(value) == line + "\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::moespec_jax.decoding.budget_config.BudgetWarning")
@pytest.mark.usefixtures("fast_compile")
def test_under_a_budget_they_are_the_budgeted_target_s(flags: list[str]) -> None:
    """Greedy tokens are the most probable ones there, not in the exact target."""
    model = load(flags[1], flags[3])
    options: Any = dict(max_new_tokens=24, ignore_eos=True, tree=TreeConfig(2, 3, 10), logprobs=1)
    exact, budgeted = (model.generate([[5, 6, 7]], budget=budget, **options) for budget in (None, 2))
    assert exact.logprobs_of is not None and budgeted.logprobs_of is not None
    assert budgeted.logprobs_of.startswith("the target under the expert budget")
    for result in (exact, budgeted):
        for token in result.prompts[0].logprobs or []:
            assert token.token_id == token.top[0].token_id and token.logprob == token.top[0].logprob
    ours, theirs = ([token.logprob for token in r.prompts[0].logprobs or []] for r in (exact, budgeted))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5) and max(abs(np.subtract(ours, theirs))) > 1e-3


@pytest.mark.slow
def test_a_pruned_node_has_those_of_its_parent() -> None:
    """With a kept weight of 1 every pruned path is exact output; its logits are too."""
    small = with_logprobs("tree", 2)
    budget = resolve(BudgetConfig(3, anchor="root", min_kept_weight=1.0), pair()[0])
    pruned = decode(
        small._replace(method=dataclasses.replace(small.method, budget=budget)), FastPrograms(), PROMPTS[:1], NEW
    )
    sequence, prompt = pruned.sequences[0], PROMPTS[0]
    assert pruned.logprobs is not None
    expected = oracle(tuple(sequence))[np.arange(len(prompt) - 1, len(sequence) - 1), sequence[len(prompt) :]]
    np.testing.assert_allclose(pruned.logprobs.token[0, len(prompt) : len(sequence)], expected, atol=1e-5)


@pytest.mark.slow
def test_a_stop_string_and_a_head_that_drafts_blocks(flags: list[str], tmp_path: Any) -> None:
    """There are as many as tokens, equal to those of plain decoding."""
    model = load(flags[1], block_head(tmp_path, flags[1]))
    text = model.generate([[5, 6, 7]], max_new_tokens=12, tree=None).prompts[0].text
    assert text
    options: Any = dict(max_new_tokens=12, ignore_eos=True, stop=text[3:5], logprobs=1)
    plain, block = (model.generate([[5, 6, 7]], tree=tree, **options).prompts[0] for tree in (None, "default"))
    assert plain.finish_reason == "stop string" and plain.logprobs is not None and block.logprobs is not None
    assert len(plain.logprobs) == len(plain.token_ids) and plain.token_ids == block.token_ids
    for one, other in zip(plain.logprobs, block.logprobs, strict=True):
        assert one.token_id == other.token_id and one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_what_cannot_be_asked_for_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--prompt", "a", "--logprobs", "2"]) == 2
    assert capsys.readouterr().err == "error: --logprobs are part of the JSON output; expected --json with it\n"
    model = load(flags[1], "none")
    for count in (-1, 321):
        with pytest.raises(RequestError, match=f"expected logprobs from 0 to the vocabulary's 320 tokens, got {count}"):
            model.generate([[5]], logprobs=count)
