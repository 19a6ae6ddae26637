"""Speeds of the first generation of a process are those of the second: first executions of programs are no decoding."""

import dataclasses
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_pair import write_pair

import moespec_jax
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.autoregressive import TargetPrefill
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.nn.decoder import forward
from moespec_jax.runtime import run as runs
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.programs import Programs

pytestmark = pytest.mark.usefixtures("fast_compile")

SLOW = 0.2  # seconds that a first execution takes longer in these tests
PROMPTS = [[5, 17, 9], [40, 41, 42, 43]]
TREE = TreeConfig(depth=1, top_k=2, size=4)


SHARED = Programs()  # compiled once for all tests


class SlowAtFirst(Programs):
    """Programs whose first execution takes `SLOW` seconds longer, and the names of all functions that were executed."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []

    def run(self, function: Any, settings: Any, params: Any, *arguments: Any, **options: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        out = jax.block_until_ready(SHARED.run(function, settings, params, *arguments, **options))
        self.runs.append(function.__name__)
        if not self.all_executed({(function, settings, shapes)}):
            time.sleep(SLOW)
        return out

    def prepare(self, *arguments: Any, **options: Any) -> Any:
        return SHARED.prepare(*arguments, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Model:
    flags = write_pair(tmp_path_factory.mktemp("pair"), 8)
    return moespec_jax.load(flags[1], flags[3])


@pytest.fixture
def slow(pair: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowAtFirst]:
    programs = SlowAtFirst()
    monkeypatch.setattr(pair, "programs", programs)
    yield programs


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"tree": None},
    "speculative": {"tree": TREE},
    "streamed": {"tree": TREE, "on_tokens": lambda new: None},
    "round by round": {"tree": TREE, "on_round": lambda number, info: None},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_first_executions_are_compilation(pair: Model, slow: SlowAtFirst, way: dict[str, Any]) -> None:
    first, second = (pair.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, **way) for _ in range(2))
    assert first.prefill_s < SLOW and first.decode_s < SLOW, "three programs were new"
    assert first.compile_s > 3 * SLOW and second.compile_s == 0.0 and not len(slow)
    assert [p.token_ids for p in first.prompts] == [p.token_ids for p in second.prompts]
    assert [p.rounds for p in first.prompts] == [p.rounds for p in second.prompts]


def test_tokens_are_those_without_a_rehearsal(pair: Model, slow: SlowAtFirst, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True, tree=None, temperature=0.9, seed=7)
    rehearsed = pair.generate(PROMPTS, **options)
    runs_before = len(slow.runs)
    monkeypatch.setattr(runs.Run, "_rehearse", lambda self, parts: None)
    without = pair.generate(PROMPTS, **options)
    assert [p.token_ids for p in without.prompts] == [p.token_ids for p in rehearsed.prompts]
    assert len(slow.runs) - runs_before == 3 < runs_before


def test_only_new_programs_are_rehearsed(pair: Model, slow: SlowAtFirst) -> None:
    pair.generate(PROMPTS[:1], max_new_tokens=1, tree=None)
    assert slow.runs == ["read", "begin"] * 2, "nothing is decoded after the only token"
    slow.runs.clear()
    pair.generate(PROMPTS[:1], max_new_tokens=6, tree=None, ignore_eos=True)
    assert [name for name, _ in groupby(slow.runs)] == ["read", "begin", "step"] * 2
    slow.runs.clear()
    pair.generate(PROMPTS[1:], max_new_tokens=6, tree=None, ignore_eos=True)
    assert slow.runs == ["read", "begin", "step"]


def test_one_chunk_of_each_length_is_rehearsed(pair: Model, slow: SlowAtFirst, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moespec_jax.decoding.autoregressive.PREFILL_CHUNK", 16)
    pair.generate([[5] * 50], max_new_tokens=2, tree=None)  # chunks of 16, 16, 16 and 16
    assert slow.runs.count("read") == 1 + 4


def test_there_is_one_cache_at_a_time(pair: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[int] = []
    init = TargetPrefill.init

    def counted(self: TargetPrefill, params: Any, batch: int, slots: int) -> Any:
        caches.append(sum(slots in array.shape and array.ndim > 3 for array in jax.live_arrays()))
        return init(self, params, batch, slots)

    monkeypatch.setattr(TargetPrefill, "init", counted)
    monkeypatch.setattr(pair, "programs", Programs())
    monkeypatch.setattr(runs, "SMALLEST_CACHE", 1024)  # a length that no other array has
    pair.generate(PROMPTS, max_new_tokens=4, tree=None)
    assert caches == [0, 0, 0]  # compilation, rehearsal and run


@pytest.mark.slow  # docs/extending.md has such a program too
def test_what_calls_back_runs_as_often_as_it_decodes(pair: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "programs", Programs())
    seen: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        jax.debug.callback(lambda: seen.append(1))
        return forward(*arguments, **options)

    def adapt(method: Speculative) -> Speculative:
        return dataclasses.replace(method, target_forward=watched)

    result = pair.generate(PROMPTS[:1], max_new_tokens=6, tree=TREE, adapt=adapt, ignore_eos=True)
    jax.effects_barrier()
    assert len(seen) == result.prompts[0].rounds


def add(settings: int, params: Any, x: Any) -> Any:
    return params + x * settings


def test_programs_that_were_freed_are_rehearsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs()
    assert not programs.all_executed({1, 2}) and programs.all_executed({1}) and not programs.all_executed({1, 3})
    programs.run(add, 1, jnp.float32(1.0), jnp.float32(2.0))
    monkeypatch.setattr("moespec_jax.runtime.programs._crowded", lambda: len(programs) > 0)
    programs.run(add, 2, jnp.float32(1.0), jnp.float32(2.0))
    assert not programs.all_executed({1})
