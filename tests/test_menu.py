"""Decoding by a menu of shapes: the text is plain decoding's, whichever shapes the rounds have."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from speculation import GREEDY, FastPrograms, speculating
from test_speculate import PROMPTS, every_family, pair, plain_tokens
from tiny_pair import run_json, write_pair

from moespec_jax.bench.rows import case_columns
from moespec_jax.cli.compare import compare
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.eagle3_drafter import Eagle3Drafter
from moespec_jax.decoding.menu import Menu, MenuState
from moespec_jax.decoding.round_info import RoundInfo
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.generate import main
from moespec_jax.measure.timing import TimingCase, decode_once
from moespec_jax.nn.cache import Cache
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import PromptResult, RunResult
from moespec_jax.runtime.round_costs import Chooser, RoundCosts, keep_costs, kept_costs
from moespec_jax.runtime.run import Batch, Run

TREES = (TreeConfig(2, 1, 4), TreeConfig(1, 3, 7))
COSTS, GAINS = [1.0, 1.3, 1.4], [1.0, 1.5, 1.5]
NEW = 60


def menu(family: str = "qwen3_moe", sampling: SamplingConfig = GREEDY) -> tuple[Menu[Any, Any], Any]:
    decodings = [speculating(*pair(family), tree, sampling) for tree in TREES]
    return Menu(tuple(decoding.method for decoding in decodings)), decodings[0].params


def priced(state: MenuState[Any], costs: list[float]) -> MenuState[Any]:
    method, params = menu()
    return method.price(params, state, jnp.asarray(costs, jnp.float32), jnp.asarray(GAINS, jnp.float32))


def every_shape_first(advance: Any, state: MenuState[Any]) -> MenuState[Any]:
    """Two rounds of every shape, twice, before rounds are chosen by `COSTS`."""
    for shape in 2 * list(range(len(COSTS))):
        state, _ = advance(priced(state, [1.0 if i == shape else float("inf") for i in range(len(COSTS))]), shape, 2)
    return priced(state, COSTS)


def run_menu(family: str, sampling: SamplingConfig, prompts: list[list[int]], **how: Any) -> Run[Any, Any, Any]:
    method, params = menu(family, sampling)
    run = Run(FastPrograms(), method, params, Batch(prompts, [len(p) + NEW for p in prompts], (), 0))
    run.execute(prepare=every_shape_first, **how)
    return run


def assert_expected(rounds: list[RoundInfo]) -> None:
    """Expected tokens of every round are those of `choice.py`'s description: decayed means, drawn to the gains."""
    assert rounds, "the texts are longer than the measurements"
    sizes, gained, tried = [1, *(tree.size for tree in TREES)], np.zeros(len(COSTS)), np.zeros(len(COSTS))
    for info in rounds:
        assert info.tree is not None and info.accepted is not None and info.expected is not None
        shape = sizes.index(info.tree.tokens.shape[1])
        np.testing.assert_allclose(info.expected, (gained[shape] + 2 * GAINS[shape]) / (tried[shape] + 2), rtol=1e-5)
        decay = np.where(np.arange(len(COSTS)) == shape, 0.9, 0.98)
        gained, tried = gained * decay, tried * decay
        gained[shape] += info.accepted.count[info.active].mean()
        tried[shape] += 1


@pytest.mark.slow_except("1.0-qwen3_moe")
@every_family
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_plain_decoding_s(family: str, temperature: float) -> None:
    """In a batch, in pieces and alone, where rounds have all shapes of the menu."""
    sampling = SamplingConfig(temperature)
    plain = plain_tokens(family, "switch", NEW, sampling)
    run = run_menu(family, sampling, PROMPTS)
    assert run.sequences == plain and min(run.rounds_of) >= 4
    assert sum(run.rounds_of) == run.rounds
    rounds: list[RoundInfo] = []
    assert run_menu(family, sampling, PROMPTS, on_round=lambda number, info: rounds.append(info)).sequences == plain
    assert_expected(rounds[4 * len(COSTS) :])
    assert run_menu(family, sampling, PROMPTS[:1]).sequences == plain[:1]


def test_a_run_is_repeated_round_by_round() -> None:
    first, second = (run_menu("qwen3_moe", SamplingConfig(1.0), PROMPTS) for _ in range(2))
    assert first.rounds_of == second.rounds_of and first.sequences == second.sequences


def waiting(aux: np.ndarray, confirmed: int, width: int) -> HeadState:
    """A drafter's state with `confirmed` pairs, and rows of hidden states that wait."""
    rows = np.zeros((1, width, aux.shape[-1]), np.float32)
    rows[0, : len(aux)] = aux
    empty = jnp.zeros((1, 1, 8, 4))
    cache = Cache((empty,), (empty,), jnp.asarray([confirmed], jnp.int32))
    return HeadState(cache, jnp.asarray(rows), jnp.zeros((1,), jnp.int32))


def test_tokens_drawn_without_a_draft_wait_as_an_accepted_path_does() -> None:
    draft = pair()[3]
    drafter, width = Eagle3Drafter(draft), 4
    aux = np.random.default_rng(0).normal(size=(3, draft.aux_size)).astype(np.float32)
    path = Accepted(jnp.asarray([[0, 1, 2, 2]], jnp.int32), jnp.asarray([3], jnp.int32), jnp.asarray([7], jnp.int32))
    accepted = drafter.commit(waiting(aux[:0], 5, width), path, jnp.asarray(aux)[None])
    skipped = waiting(aux[:0], 5, width)
    for number in range(3):
        row = jnp.asarray(aux[None, number : number + 1])
        skipped = drafter.skip(skipped, jnp.asarray([5 + number], jnp.int32), row)
    np.testing.assert_array_equal(skipped.aux[:, :3], accepted.aux[:, :3])
    assert int(skipped.skipped[0]) == int(accepted.skipped[0]) == 0


def test_where_many_tokens_are_drawn_without_a_draft_the_last_ones_wait() -> None:
    draft = pair()[3]
    drafter, width = Eagle3Drafter(draft), 4
    aux = np.random.default_rng(0).normal(size=(9, draft.aux_size)).astype(np.float32)
    state = waiting(aux[:0], 5, width)
    for number in range(9):
        state = drafter.skip(state, jnp.asarray([5 + number], jnp.int32), jnp.asarray(aux[None, number : number + 1]))
    np.testing.assert_array_equal(state.aux[0], aux[-width:])
    assert int(state.skipped[0]) == 9 - width and int(state.cache.length[0]) == 5


def test_drafts_after_a_gap_are_of_the_head_at_the_true_positions() -> None:
    """A head that lacks pairs drafts as one that never saw those tokens, whose first pairs keep their positions: here
    none remain before the gap, so that its tree is that of a head that reads the last pairs alone, moved by the gap."""
    method, params = menu()
    run = Run(FastPrograms(), method, params, Batch(PROMPTS[:1], [60], (), 0))
    state = run.state_after(12).speculation
    drafter, tree = method.trees[0].drafter, TREES[0]
    length = int(state.decoding.length[0])
    none = jax.tree.map(jnp.zeros_like, state.draft.cache.length)
    width = state.draft.aux.shape[1]
    gap = dataclasses.replace(
        state.draft, cache=dataclasses.replace(state.draft.cache, length=none),
        skipped=jnp.full_like(none, length - 1 - width),
    )  # fmt: skip
    trees, after = fast_jit(lambda p, s: drafter.propose(tree, p, s))(params, dataclasses.replace(state, draft=gap))
    assert int(after.draft.cache.length[0]) == width
    assert int(after.draft.skipped[0]) + width == length - 1
    assert int(trees.tokens[0, 0]) == int(state.decoding.tokens[0, length - 1])


@pytest.fixture
def kept_programs(tmp_path: Path) -> Iterator[None]:
    """A directory of compiled programs of its own."""
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("kept_programs")
def test_costs_are_measured_once_and_kept() -> None:
    identity: dict[str, Any] = {"model": "a", "batch": 1}
    method, params = menu()
    known: dict[str, RoundCosts] = {}
    steps: list[int] = []

    def decode(known: dict[str, RoundCosts], new: int) -> tuple[dict[str, Any], list[list[int]]]:
        programs = FastPrograms()
        run = Run(programs, method, params, Batch(PROMPTS[:1], [len(PROMPTS[0]) + new], (), 0))
        chooser = Chooser(method, params, run, programs, identity, known)
        run.execute(prepare=chooser.prepare, first_parts=chooser.first_parts)
        steps.append(programs.traces["Shape.step"])
        return chooser.report(), run.sequences

    short, _ = decode({}, 40)
    begun = kept_costs(identity)
    assert short["round_s"] is None and begun is not None and not begun.complete and begun.seconds[0]
    first, text = decode(known, 240)
    kept = kept_costs(identity)
    assert kept is not None and kept.complete and kept.seconds[0][0] == begun.seconds[0][0]
    assert list(first["round_s"]) == ["plain", "4/2/1", "7/1/3"] and min(first["round_s"].values()) > 0
    assert kept.round_s == list(first["round_s"].values()) and kept.gains == list(first["gains"].values())
    again, same = decode({}, 240)
    assert again["source"] == kept.source and again["round_s"] == first["round_s"] and same == text
    chosen = [name for name, count in again["rounds"].items() if count]
    assert steps[-1] <= len(chosen) + 1, "only programs of shapes that are chosen, or may be first, are compiled"
    assert kept_costs(identity | {"batch": 2}) is None
    Path(kept.source).write_text("{")
    assert kept_costs(identity) is None


def chosen_result(tokens_per_s: float, choice: dict[str, Any] | None = None) -> RunResult:
    prompt = PromptResult(None, [1, 2, 3, 4], 1, 4, 3, 1.5, [0.5], "length")
    return RunResult(
        [prompt], 1.0, 1.0, 1.0, 1.0, 0.0, True, "", True, {}, None, None, None, None, 0.0, 0.0, 4 / tokens_per_s,
        tokens_per_s, None, "cpu", "float32", None, "dense", {}, choice,
    )  # fmt: skip


CHOICE = {
    "rounds": {"plain": 1, "5/3/1": 2, "16/4/4": 1}, "round_s": {"plain": 1.0, "5/3/1": 1.5, "16/4/4": 4.0},
    "gains": {"plain": 1.0, "5/3/1": 2.4, "16/4/4": 3.6}, "predicted_s": 8.0,
}  # fmt: skip


def test_a_comparison_is_also_with_the_tree_that_pays_most_by_the_costs() -> None:
    speeds = {"auto": 10.0, None: 5.0, TreeConfig(3, 1, 5): 8.0}
    generate = lambda tree, **_: chosen_result(speeds[tree], CHOICE if tree == "auto" else None)  # noqa: E731
    found = compare(generate, DecodingSpec("auto"), repeats=2)
    assert found.fixed == "5/3/1" and found.fixed_tokens_per_s == 8.0
    assert found.over_fixed is not None and found.over_fixed.median == 1.25 and found.over_plain.median == 2.0
    unmeasured = lambda tree, **_: chosen_result(5.0, CHOICE | {"round_s": None} if tree == "auto" else None)  # noqa: E731
    assert compare(unmeasured, DecodingSpec("auto"), repeats=2).fixed is None


def test_bench_reports_shares_of_rounds_and_the_error_of_the_prediction() -> None:
    model = object.__new__(Model)
    model.generate = lambda *_, **__: chosen_result(1.0, CHOICE)
    stats = decode_once(model, [[1], [2]], TimingCase(DecodingSpec("auto")), 4)
    assert stats["choice"] == {
        "share_of_rounds": {"plain": 0.25, "5/3/1": 0.5, "16/4/4": 0.25},
        "predicted_over_measured": 2.0,
    }
    row = case_columns(TimingCase(DecodingSpec("auto")))
    assert row["tree"] == "auto" and row["steps"] is None and row["num_draft_tokens"] is None


@pytest.mark.usefixtures("kept_programs")
def test_every_round_chooses_by_default_where_the_costs_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batch at hand, for exact output, and where all shapes were measured."""
    monkeypatch.setattr(Model, "costs_identity", lambda self, spec, batch: {"batch": batch})
    model, default = object.__new__(Model), DecodingSpec("default")
    model.draft, model.round_costs = pair()[3], {}  # pyright: ignore[reportAttributeAccessIssue]
    names = ("plain", "3/1/1")
    assert model._chosen_by_default(default, 1) == default
    keep_costs({"batch": 1}, names, RoundCosts([[1.0] * 3, [2.0]], [[1.0] * 3, [2.0]]))
    assert model._chosen_by_default(default, 1) == default
    keep_costs({"batch": 1}, names, RoundCosts([[1.0] * 3, [2.0] * 3], [[1.0] * 3, [2.0] * 3]))
    assert model._chosen_by_default(default, 1).tree == "auto" and model._chosen_by_default(default, 2) == default
    for other in (DecodingSpec(), DecodingSpec(TREES[0]), DecodingSpec("default", BudgetConfig(4))):
        assert model._chosen_by_default(other, 1) == other
    model.draft = None
    assert model._chosen_by_default(default, 1) == default


@pytest.mark.slow
def test_the_command_reports_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*write_pair(tmp_path, 40), "--prompt-ids", "5,6,7", "--compilation-cache", "none"]
    plain = run_json(capsys, *flags[:2], *flags[4:], "--draft-model", "none")
    auto = run_json(capsys, *flags, "--speculate", "auto", "--trace", str(tmp_path / "trace.jsonl"))
    assert auto["prompts"][0]["token_ids"] == plain["prompts"][0]["token_ids"] and auto["exact"]
    rounds = auto["choice"]["rounds"]
    assert list(rounds) == ["plain", "3/1/1", "5/3/1", "16/4/4", "60/7/10"]
    assert sum(rounds.values()) == auto["prompts"][0]["rounds"]
    records = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    sizes = [len(record["tokens"]) for record in records]
    assert len(records) == sum(rounds.values()) and sizes.count(1) == rounds["plain"]
    shapes = [record["shape"] for record in records]
    assert {name: shapes.count(None if name == "plain" else name) for name in rounds} == rounds
    assert main([*flags, "--speculate", "auto", "--compare"]) == 0
    assert "chosen each round" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--tree-depth", "2"], ["--simulate-accept-length", "2"]])
def test_auto_takes_no_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    flags = [*write_pair(tmp_path, 4), "--prompt-ids", "5,6,7"]
    assert main([*flags, "--speculate", "auto", *more]) == 2
    assert "auto" in capsys.readouterr().err
