"""The bench: rows follow from the turns that were taken, a run that was killed goes on to the same rows, and what is
simulated says so everywhere."""

import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation import FastPrograms

from moespec_jax.bench import __main__ as bench
from moespec_jax.bench.random_pair import check_memory, random_model, shapes_of
from moespec_jax.bench.rows import best_exact, result_rows
from moespec_jax.bench.sweep import parse_config, sweep
from moespec_jax.bench.table import cells_of, output_word
from moespec_jax.bench.verification import verify_many
from moespec_jax.checkpoint.parameters import leaf_shapes
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.round_info import experts_read, mean_distinct_experts
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.errors import RequestError
from moespec_jax.measure.timing import TimingCase
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.run import Batch, Run

TOY = ["--random", "toy", "--count", "2", "--tokens", "14", "--longest-prompt", "10", "--repeats", "2"]
SWEEP = ["--trees", "6/2/2", "--budgets", "0.25"]
CASES = ["plain", "6/2/2", "6/2/2 B=0.25"]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled quickly, the ceiling is not measured, and the tests' compilation cache stays."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setattr(bench, "random_model", fast_toy)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)


def fast_toy(shape: str, layers: int | None, dtype: str | None, backend: None = None) -> Any:
    model = random_model(shape, layers, dtype, BACKENDS["slots"])
    model.programs = FastPrograms()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of the toy."""
    directory = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "random_model", fast_toy)
        patch.setattr(bench, "copy_bandwidth", lambda: 1e9)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        assert bench.main([*TOY, *SWEEP, "--output", str(directory)]) == 0
    return directory


@pytest.mark.slow
def test_rows_are_what_the_recorded_turns_say(finished: Path) -> None:
    rows = {row["setting"]: row for row in read_lines(finished / "bench.jsonl")}
    tasks = {line["task"]: line["value"] for line in read_lines(finished / "turns.jsonl")[1:]}
    turns = [{name: tasks[f"random tokens: turn {turn}, {name}"] for name in CASES} for turn in (0, 1)]
    speeds = [{name: stats["tokens"] / stats["decode_s"] for name, stats in turn.items()} for turn in turns]
    assert list(rows) == CASES
    exact = max(CASES[:2], key=lambda name: statistics.median(s[name] for s in speeds))
    for name, row in rows.items():
        own = [s[name] for s in speeds]
        assert row["output_throughput"] == {"median": statistics.median(own), "min": min(own), "max": max(own)}
        bases = {"over_plain": "plain", "over_best_exact": exact}
        bases["over_exact_same_tree"] = name.removesuffix(" B=0.25")
        for column, base in bases.items():
            over = [s[name] / s[base] for s in speeds]
            assert row[column] == {"median": statistics.median(over), "min": min(over), "max": max(over)}, column
        assert row["best_exact"] == exact
        assert row["accept_length"] == pytest.approx(1 + sum(row["accepted_by_depth"]), abs=1e-3)
        ms = [turn[name]["decode_s"] / turn[name]["rounds"] * 1e3 for turn in turns]
        assert row["round_ms"]["max"] == pytest.approx(max(ms))


@pytest.mark.slow
def test_a_round_reads_what_it_must_at_the_speed_of_a_copy(finished: Path) -> None:
    """The floor is a line in the experts read: its slope is the bytes of an expert, over a bandwidth of 1 GB/s."""
    model, expert = fast_toy("toy", None, None), 3 * 64 * 32 * 4
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) - model.params.embed.nbytes
    for row in read_lines(finished / "bench.jsonl"):
        least = (whole - (16 - row["experts_read"]) * 3 * expert) / 1e9
        share = row["round_share_of_copy_bandwidth"]
        assert share["max"] == pytest.approx(least / (row["round_ms"]["min"] / 1e3), rel=1e-5)
        assert (row["verify_share_of_copy_bandwidth"] is None) == (row["verify_ms"] is None) == (row["steps"] == 0)


@pytest.mark.slow
def test_a_budget_reads_less_and_is_in_every_row(finished: Path) -> None:
    plain, exact, budgeted = read_lines(finished / "bench.jsonl")
    assert budgeted["experts_read"] <= 4 < exact["experts_read"] == exact["experts_wanted"]
    assert budgeted["mass_kept"] < 1 == exact["mass_kept"] and budgeted["tokens_replaced"] > 0
    assert budgeted["expert_budget"] == "0.25" and budgeted["budget"]["score"] == BudgetConfig.score
    assert exact["budget"] is None and plain["experts_read"] == 2
    words = ("batch_size", "steps", "topk", "num_draft_tokens")
    assert [[row[w] for w in words] for row in (plain, exact, budgeted)] == [[1, 0, 0, 0], [1, 3, 2, 6], [1, 3, 2, 6]]


@pytest.mark.slow
def test_what_is_simulated_says_so_everywhere(finished: Path) -> None:
    rows = read_lines(finished / "bench.jsonl")
    for row in rows:
        assert row["simulated"] is True and row["weights"] == "random" and row["simulated_routing_skew"] > 0
        assert output_word(row) == "simulated" and "simulated" in cells_of(row)
        assert row["device"] and row["dtype"] == "float32" and row["versions"]["jax"] == jax.__version__
    assert [row["simulated_accept_length"] is None for row in rows] == [True, False, False]
    assert [row["same_tokens_as_plain"] is None for row in rows] == [False, True, True]
    table = (finished / "bench.md").read_text()
    assert table.startswith("SIMULATED") and table.count("| simulated |") == len(rows)
    assert (finished / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1, 4, 7])
def test_cut_off_anywhere_it_goes_on_to_the_same_rows(
    finished: Path, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is still missing is measured as it was the first time: then every file is the same."""
    lines = (finished / "turns.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "turns.jsonl").write_text("".join(lines[: 1 + kept]) + lines[-1][:20] * (kept < 7))
    tasks = {line["task"]: line["value"] for line in map(json.loads, lines[1:])}
    missing = [t for t in tasks if "turn" in t and t not in {json.loads(line)["task"] for line in lines[1 : 1 + kept]}]
    taken: dict[TimingCase, int] = {}

    def recorded(model: Any, prompts: Any, case: TimingCase, new_tokens: int) -> dict[str, Any]:
        """At first to warm up, then for each turn that is missing."""
        name = CASES[(case.spec.tree is not None) + (case.spec.budget is not None)]
        own = [task for task in missing if task.endswith(f", {name}")]
        taken[case] = taken.get(case, -1) + 1
        return tasks[own[max(taken[case] - 1, 0)]]

    monkeypatch.setattr(bench, "decode_and_verify", recorded)
    assert bench.main([*TOY, *SWEEP, "--output", str(tmp_path), "--json"]) == 0
    assert sum(taken.values()) == len(missing)
    for name in ("turns.jsonl", "bench.jsonl", "bench.md"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    out, err = capsys.readouterr()
    assert out == (finished / "bench.jsonl").read_text()
    assert ("nothing is measured" in err) == (kept == 7)


@pytest.mark.slow
def test_another_sweep_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "turns.jsonl").read_bytes()
    assert bench.main([*TOY, "--trees", "4/2/1", "--output", str(finished)]) == 2
    assert "expected" in capsys.readouterr().err and (finished / "turns.jsonl").read_bytes() == before


def fake(tokens_per_s: float, ids: list[int], **changes: Any) -> dict[str, Any]:
    same = dict(
        decode_s=1.0, tokens=tokens_per_s, rounds=10, prefill_s=0.1, compile_s=1.0, verify_s=None, verify_experts=None,
        accept_length=1.0, accepted_by_depth=[], experts_wanted=2.0, experts_read=2.0, mass_kept=1.0,
        tokens_replaced=0.0, exact=True, simulated=None, token_ids=[ids],
    )  # fmt: skip
    return same | changes


def test_best_exact_is_the_highest_median_of_its_batch_without_a_budget() -> None:
    tree, budget = TreeConfig(2, 1, 4), BudgetConfig(4)
    cases = {
        "a": TimingCase(),
        "b": TimingCase(DecodingSpec(tree)),
        "c": TimingCase(DecodingSpec(tree, budget)),
        "d": TimingCase(batch=2),
    }
    # b has the highest mean and the highest single turn; c is faster still, but lossy.
    speeds = {"a": (10, 11, 12), "b": (9, 10, 100), "c": (200, 200, 200), "d": (50, 60, 70)}
    turns = [{name: fake(speeds[name][turn], [1, 2, 3, turn]) for name in cases} for turn in range(3)]
    turns[-1]["c"] = fake(200, [1, 2, 9, 2], exact=False)
    assert best_exact(cases, turns) == {1: "a", 2: "d"}
    rows = result_rows(cases, turns, lambda experts: experts, {})
    budgeted = rows[2]
    assert budgeted["over_best_exact"] == {"median": 200 / 11, "min": 200 / 12, "max": 200 / 10}
    assert budgeted["over_exact_same_tree"] == {"median": 20.0, "min": 2.0, "max": 200 / 9}
    assert rows[3]["over_plain"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert budgeted["same_tokens_as_plain"] == 0.5 and not budgeted["exact"] and rows[1]["same_tokens_as_plain"] == 1.0
    assert [output_word(row | {"simulated": False}) for row in rows] == ["exact", "exact", "LOSSY", "exact"]


@pytest.mark.slow
def test_a_loop_of_verifications_reads_what_one_reads() -> None:
    """And makes as many passes as are asked of it, each of the same tokens."""
    model = fast_toy("toy", None, "float32")
    spec = model.resolve(DecodingSpec(TreeConfig(2, 2, 6), simulate_accept_length=2.0))
    method, params = model.speculative(spec, SamplingConfig()), model.speculative_params
    state = Run(model.programs, method, params, Batch([[5, 17, 9]], [40], (), 0)).state_after(2)
    trees, _ = model.programs.run(Speculative.propose, method, params, state)
    _, _, info = model.programs.run(Speculative.verify, method, params, state, trees)
    wanted = float(mean_distinct_experts(experts_read(model.config, info, 1)))
    for passes in (1, 3):
        read = model.programs.run(verify_many, method, params, state, trees, jnp.int32(passes))
        assert float(read) == wanted > 2


@pytest.mark.parametrize(
    "text, batch, tree",
    [
        ("1,0,0,0", 1, None),
        ("1,3,1,4", 1, TreeConfig(2, 1, 4)),
        ("4,8,10,60", 4, TreeConfig(7, 10, 60)),
        ("1,1,1,2", 1, TreeConfig(0, 1, 2)),
    ],
)
def test_configs_are_specforges(text: str, batch: int, tree: TreeConfig | None) -> None:
    assert parse_config(text) == (batch, tree)


@pytest.mark.parametrize("text", ["", "1,3,1", "0,3,1,4", "1,0,1,4", "1,3,1,60", "a,b,c,d", "1,3,1,4,5", "1.5,3,1,4"])
def test_other_configs_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="batch-size,steps,topk,num-draft-tokens"):
        parse_config(text)


def arguments_of(*argv: str) -> Any:
    return bench._parser().parse_args(list(argv))


def test_every_batch_size_has_its_plain_and_every_tree_its_exact_run() -> None:
    found = sweep(
        arguments_of("--config-list", "1,3,1,4", "4,3,1,4", "--budgets", "none", "8", "--budget-size", "mass")
    )
    budget = BudgetConfig(8, size="mass")
    tree = TreeConfig(2, 1, 4)
    assert found == {
        "plain": TimingCase(),
        "plain x4": TimingCase(batch=4),
        "4/2/1": TimingCase(DecodingSpec(tree)),
        "4/2/1 B=8": TimingCase(DecodingSpec(tree, budget)),
        "4/2/1 x4": TimingCase(DecodingSpec(tree), 4),
        "4/2/1 B=8 x4": TimingCase(DecodingSpec(tree, budget), 4),
    }
    same = sweep(arguments_of("--trees", "plain", "4/2/1", "--budgets", "none"))
    assert same == {"plain": TimingCase(), "4/2/1": TimingCase(DecodingSpec(tree))}


def test_cases_are_recorded_under_their_older_names_and_apart_from_each_other() -> None:
    """What the requests of turns.jsonl say of them, by which an interrupted sweep is found again."""
    likely: dict[str, Any] = dict(anchor="likely", anchor_probability=0.0, min_kept_weight=0.5)
    budgets = [
        BudgetConfig(8, **likely),
        BudgetConfig(8, coverage="truncate", **likely),
        BudgetConfig(8, anchor="root"),
    ]
    cases = [TimingCase(), *(TimingCase(DecodingSpec(TreeConfig(2, 1, 4), budget, 2.0), 4) for budget in budgets)]
    plain, before, *others = recorded = [bench._recorded(case) for case in cases]
    assert plain == "Setting(tree=None, budget=None, batch=1, simulate=None)"
    assert before == (
        "Setting(tree=TreeConfig(depth=2, top_k=1, size=4), budget=BudgetConfig(experts=8, coverage='guarantee',"
        " score='path', credit='squares', anchor='none', size='fixed', mass=0.9, guarantee=0.0, faithfulness=0.5,"
        " groups=1), batch=4, simulate=2.0)"
    )
    assert len(set(recorded)) == len(recorded) and all("guarantee'" not in other for other in others)


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown shape": (["--random", "gpt-5"], "invalid choice: 'gpt-5'"),
    "bad config": (["--config-list", "1,3"], "expected a config as batch-size,steps,topk,num-draft-tokens"),
    "bad tree": (["--trees", "60"], "expected a tree as SIZE/DEPTH/TOP-K"),
    "both spellings": (["--trees", "4/2/1", "--config-list", "1,3,1,4"], "not allowed with"),
    "twice the same": (["--trees", "4/2/1", "4/2/1"], "differ"),
    "budget below k": ([*TOY, "--budgets", "1"], "from 2 to 16"),
    "budget below k of a checkpoint": (["--budgets", "1"], "expected an expert budget from"),
    "no number": ([*TOY, "--budgets", "many"], "expected --expert-budget as a number"),
    "a rule of nothing": (["--budgets", "none", "--budget-size", "mass"], "expected --budgets"),
    "batches that do not come out even": ([*TOY, "--config-list", "4,3,1,4"], "fill batches of 4; there are 2"),
    "layers of a checkpoint": (["--layers", "2"], "expected --random"),
    "simulation of a checkpoint": (["--accept-length", "2"], "expected --random"),
    "too short": ([*TOY, "--accept-length", "0.5"], "--accept-length of at least 1"),
    "text for random weights": ([*TOY, "--chat"], "--random has no text"),
    "a model and random weights": ([*TOY, "--model", "here"], "--random has no text"),
    "more layers than there are": ([*TOY, "--layers", "4"], "expected --layers from 1 to toy's 3"),
    "no layers": ([*TOY, "--layers", "0"], "expected --layers from 1"),
    "no turns": ([*TOY, "--repeats", "0"], "--repeats of at least 1"),
    "no prompts": (["--prompts", "here=/nowhere.jsonl"], "/nowhere.jsonl"),
    "no head": (["--draft-model", "none"], "expected a draft head"),
}


@pytest.mark.parametrize("argv, words", REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = shapes_of("OLMoE-1B-7B", 2)
    expected = sum(np.prod(shape) for shape in leaf_shapes(config, BACKENDS["slots"]).values()) * 4
    for memory, fits in ((expected, True), (expected - 4, False)):
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": memory // 4}.__getitem__)
        if fits:
            check_memory(config, "float32")
        else:
            with pytest.raises(RequestError, match="2 layers take 4 GB in float32: see --layers"):
                check_memory(config, "float32")


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert "examples:" in said and all(len(line) <= 120 for line in said.splitlines())
