"""Samples of a prompt are the sequences of a batch that has the prompt as often, and the prompt is read once."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from own_mesh import block_head
from speculation import Decoding, FastPrograms, plainly, speculating
from test_speculate import CHAIN, PROMPTS, SMALL, pair
from tiny_pair import run_json, write_pair

from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.menu import Menu
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.errors import RequestError
from moespec_jax.generate import main
from moespec_jax.parallel.mesh import AXES
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.prompt_cache import PromptCache
from moespec_jax.runtime.run import Batch, Run
from moespec_jax.runtime.samples import rows_of_one_read, with_samples

SAMPLING, NEW, SAMPLES = SamplingConfig(0.9), 12, 3


class Recorder(FastPrograms):
    """Keeps the shapes of the tokens that prefill reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[int, ...]] = []

    def run(self, function: Any, settings: Any, params: Any, *arguments: Any, **options: Any) -> Any:
        if function.__name__ == "read":
            self.read.append(arguments[1].shape)
        return super().run(function, settings, params, *arguments, **options)


def decoding(name: str, backend: str) -> Decoding:
    parts = pair("qwen3_moe", backend)
    if name == "plain":
        return plainly(*parts[:3], SAMPLING)
    small, chain = (speculating(*parts, tree, SAMPLING) for tree in (SMALL, CHAIN))
    if name == "menu":
        return small._replace(method=Menu((chain.method, small.method)))
    if name == "budget":
        budgeted = dataclasses.replace(small.method, budget=resolve(BudgetConfig(3), parts[0]))
        return small._replace(method=budgeted)
    return {"chain": chain, "16/4/4": small}[name]


@pytest.mark.slow_except("plain-switch", "16/4/4-slots", "budget-switch")
@pytest.mark.parametrize("backend", ["switch", "slots"])
@pytest.mark.parametrize("name", ["plain", "chain", "16/4/4", "menu", "budget"])
def test_samples_are_the_sequences_of_a_batch(name: str, backend: str) -> None:
    """Layers unrolled and stacked, prompts of unequal length; in float32, so that passes of other sizes round alike."""
    how, programs, prompts = decoding(name, backend), Recorder(), with_samples(PROMPTS[::2], SAMPLES)
    runs = []
    for samples in (1, SAMPLES):
        batch = Batch(prompts, [len(prompt) + NEW for prompt in prompts], (9,), 3, samples)
        runs.append(Run(programs, how.method, how.params, batch))
        runs[-1].execute()
    whole, sampled = runs
    assert sampled.sequences == whole.sequences
    np.testing.assert_array_equal(sampled.accepted, whole.accepted)
    assert {shape[0] for shape in programs.read} == {6, 2} and programs.read[-1][0] == 2
    assert len({tuple(sequence) for sequence in sampled.sequences}) > 4


def test_rows_that_are_read_leave_every_device_as_many() -> None:
    """All samples share a row; on a mesh as many as let the devices divide what is read, as plain arithmetic finds."""

    def mesh(shards: int) -> Mesh:
        return Mesh(np.array([jax.devices()[0]] * shards, object).reshape(shards, 1, 1), AXES)

    for prompts in range(1, 5):
        for samples in range(1, 9):
            assert rows_of_one_read(prompts * samples, samples, None) == samples
            for shards in (1, 2, 3, 4):
                found = rows_of_one_read(prompts * samples, samples, mesh(shards))
                fitting = [
                    c for c in range(1, samples + 1) if samples % c == 0 and prompts * samples // c % shards == 0
                ]
                assert found == max(fitting, default=1)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pair(tmp_path_factory.mktemp("pair"), 6)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_the_first_sample_is_what_one_run_gives(flags: list[str]) -> None:
    """With the cache that this run leaves, the prompt is not read again."""
    model, ids, cache = load(flags[1], flags[3]), [*range(5, 30)], PromptCache()
    options: Any = dict(max_new_tokens=6, temperature=1.0, ignore_eos=True)
    one = model.generate([ids], prompt_cache=cache, **options)
    three, cached = (model.generate([ids], samples=3, prompt_cache=given, **options) for given in (None, cache))
    tokens = [prompt.token_ids for prompt in three.prompts]
    assert tokens[0] == one.prompts[0].token_ids and len(set(map(tuple, tokens))) == 3
    assert tokens == [prompt.token_ids for prompt in cached.prompts]
    assert [prompt.cached_tokens for prompt in cached.prompts] == [len(ids) - 1] * 3
    assert (one.samples, three.samples) == (1, 3) and [prompt.sample for prompt in three.prompts] == [0, 1, 2]


@pytest.mark.slow
def test_samples_of_a_head_with_a_context(tmp_path: Path) -> None:
    """The state of a DSpark head after the prompt is repeated, too."""
    flags = write_pair(tmp_path, 8)
    model = load(flags[1], block_head(tmp_path, flags[1]))
    options: Any = dict(max_new_tokens=8, temperature=1.0, ignore_eos=True)
    whole, sampled = model.generate([[5, 6, 7]] * 3, **options), model.generate([[5, 6, 7]], samples=3, **options)
    assert [p.token_ids for p in whole.prompts] == [p.token_ids for p in sampled.prompts]
    assert [p.accepted_by_depth for p in whole.prompts] == [p.accepted_by_depth for p in sampled.prompts]


def test_no_samples_are_refused(flags: list[str]) -> None:
    model, unchecked = load(flags[1], "none"), inspect.unwrap(Model.generate)
    for samples, says in (
        (0, "expected samples of at least 1, got 0"),
        (1.5, "expected samples as a whole number; got 1.5"),
    ):
        with pytest.raises(RequestError, match=says):
            unchecked(model, [[5]], samples=samples)
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        unchecked(model, [[5], []], samples=3)


@pytest.mark.usefixtures("fast_compile")
def test_the_command_numbers_them(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*flags, "--prompt", "the cat", "--prompt", "def add", "--samples", "2", "--temperature", "1"]
    result = run_json(capsys, *flags)
    assert result["samples"] == 2 and [prompt["sample"] for prompt in result["prompts"]] == [0, 1, 0, 1]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    names = ["prompt 0, sample 0", "prompt 0, sample 1", "prompt 1, sample 0", "prompt 1, sample 1"]
    begun = zip(["the cat"] * 2 + ["def add"] * 2, result["prompts"], strict=True)
    texts = [text + prompt["text"] for text, prompt in begun]
    heads = [f"--- {name} (6 new tokens, length)" for name in names]
    assert out == "".join(f"{head}\n{text}\n" for head, text in zip(heads, texts, strict=True))
    read = sum(prompt["prompt_tokens"] for prompt in result["prompts"][::2])
    assert f" ms for {read} tokens" in err


def test_samples_of_conversations_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "turns.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n')
    assert main(["--prompt-file", str(file), "--samples", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --trace, --compare and --samples are of one batch")
