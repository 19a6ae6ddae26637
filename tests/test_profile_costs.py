"""Costs of rounds in a profile come back as they were timed, and decide in place of costs of the first runs."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from speculation import FastPrograms
from test_menu import PROMPTS, TREES, menu
from tiny_pair import run_json, write_pair

from moespec_jax import BudgetConfig, RequestError, TreeConfig, read_costs, read_profile
from moespec_jax.cli.round_trace import round_records
from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.cost_table import CostTable
from moespec_jax.decoding.round_info import RoundInfo, RoundShape
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.tree import Tree
from moespec_jax.generate import main
from moespec_jax.measure.timing import TimingCase
from moespec_jax.runtime.drafters import MENU
from moespec_jax.runtime.round_costs import Chooser, known_by, with_shapes
from moespec_jax.runtime.run import Batch, Run
from moespec_jax.runtime.tuned_profile import FORMAT, setting_fields, write_profile
from moespec_jax.tune.round_times import Timed, cost_tables, timed_rounds

pytestmark = pytest.mark.usefixtures("fast_compile")
BUDGET = BudgetConfig(6, anchor="root", min_kept_weight=0.3)
SETTINGS = {
    "config": "tiny", "precision": "float32", "backend": "dense", "batch": 1, "mesh": None, "device": "cpu (cpu)",
    "cores": 2,
}  # fmt: skip


def identity(spec: DecodingSpec) -> dict[str, Any]:
    return SETTINGS | {"budget": None if spec.budget is None else spec.budget.as_dict()}


def timed(tree: TreeConfig | None, seconds: list[float], tokens: float, budget: BudgetConfig | None = None) -> Timed:
    return Timed(DecodingSpec(tree, budget), seconds, [tokens] * len(seconds))


def written(file: Path, rounds: list[Timed], budget: BudgetConfig | None = None) -> Path:
    write_profile(file, TREES[0], budget, {"costs": cost_tables(rounds, identity)})
    return file


ROUNDS = [
    timed(None, [1.0, 1.2], 1.0),
    timed(TREES[0], [1.5, 1.4], 1.8),
    timed(TREES[1], [2.0], 2.2),
    timed(TREES[0], [1.1], 1.7, BUDGET),
    timed(None, [0.9], 1.0),
]


def test_costs_come_back_as_they_were_timed(tmp_path: Path) -> None:
    """Costs are of the profile's own budget; plain rounds are exact, and their measurements are in every table."""
    exact = read_costs(written(tmp_path / "exact.json", ROUNDS))
    assert exact["budget"] is None and exact["tree"].trees == TREES
    assert exact["tree"].seconds == ((1.0, 1.2, 0.9), (1.5, 1.4), (2.0,))
    assert exact["tree"].tokens == ((1.0, 1.0, 1.0), (1.8, 1.8), (2.2,))
    lossy = read_costs(written(tmp_path / "lossy.json", ROUNDS, BUDGET))
    assert lossy["budget"] == BUDGET and lossy["tree"].trees == TREES[:1]
    assert lossy["tree"].seconds == ((1.0, 1.2, 0.9), (1.1,)) and lossy["tree"].source == str(tmp_path / "lossy.json")


def test_rounds_are_timed_by_the_turns_of_a_search() -> None:
    case = TimingCase(DecodingSpec(TREES[0]))
    stats = [{"a": {"decode_s": s, "rounds": 4, "accept_length": g}} for s, g in ((2.0, 1.5), (1.0, 1.75))]
    assert timed_rounds({"a": case}, stats) == [Timed(case.spec, [0.5, 0.25], [1.5, 1.75])]


def test_within_a_divergence_only_trees_measured_so_are_chosen(tmp_path: Path) -> None:
    """Under the budget of the fastest setting; where that is exact, all trees."""
    rounds = [*ROUNDS, timed(TREES[1], [1.2], 2.9, BUDGET)]
    settings = [(TREES[0], BUDGET, 0.01, 5.0), (TREES[1], BUDGET, 0.03, 9.0), (None, None, None, 3.0)]
    finalists = [
        setting_fields(tree, budget)
        | {"exact": kl is None, "loss": {"kl": kl}, "tokens_per_s": {"median": tokens_per_s}}
        for tree, budget, kl, tokens_per_s in settings
    ]
    file, costs = tmp_path / "p.json", cost_tables(rounds, identity)
    write_profile(file, None, None, {"costs": costs, "finalists": finalists})
    assert read_costs(file, max_kl=0.05)["tree"].trees == TREES
    within = read_costs(file, max_kl=0.02)
    assert within["budget"] == BUDGET and within["tree"].trees == TREES[:1]
    assert within["tree"].seconds == ((1.0, 1.2, 0.9), (1.1,))
    exact = read_costs(file, max_kl=0.001)
    assert exact["budget"] is None and exact["tree"].trees == TREES


def test_a_menu_is_the_fastest_tree_those_of_the_menu_and_others_by_speed(tmp_path: Path) -> None:
    others = [TreeConfig(depth, 1, depth + 2) for depth in (0, 2, 4, 5, 6)]
    rounds = [timed(None, [1.0], 1.0), *(timed(tree, [2.0], 1.0 + tree.depth) for tree in (*others, *MENU[:2]))]
    found = read_costs(written(tmp_path / "p.json", rounds))["tree"]
    assert [tree.name for tree in found.trees] == ["3/1/1", "5/3/1", "6/4/1", "7/5/1", "8/6/1"]
    assert found.tokens[1:] == ((2.0,), (4.0,), (5.0,), (6.0,), (7.0,))


def test_the_costs_of_a_profile_are_known_before_the_first_run(tmp_path: Path) -> None:
    here = SETTINGS | {"batch": 2, "device": "gpu (a card)"}
    (costs,) = known_by(read_costs(written(tmp_path / "p.json", ROUNDS))["tree"], here, {}).values()
    assert costs.complete and costs.round_s == [0.9, 1.4, 2.0] and costs.gains == [1.0, 1.8, 2.2]
    assert costs.source == f"{tmp_path / 'p.json'} (measured with another batch, device)"


@pytest.mark.slow
def test_the_costs_of_a_profile_decide(tmp_path: Path) -> None:
    """Nothing is measured; the result names the file."""
    here = SETTINGS | {"batch": 2, "shapes": [tree.name for tree in TREES]}
    (method, params), programs = menu(), FastPrograms()
    texts = []
    for tree_s, shape in ((1.01, "4/2/1"), (9.0, "plain")):
        file = written(tmp_path / "p.json", [timed(None, [1.0], 1.0), timed(TREES[0], [tree_s], 1.9), ROUNDS[2]])
        run = Run(programs, method, params, Batch(PROMPTS[:1], [len(PROMPTS[0]) + 40], (), 0))
        chooser = Chooser(method, params, run, programs, here, known_by(read_costs(file)["tree"], here, {}))
        seen: list[RoundInfo] = []
        on_round = with_shapes(lambda number, info, seen=seen: seen.append(info), "auto", chooser)
        run.execute(None, on_round, chooser.prepare, first_parts=chooser.first_parts)
        texts.append(run.sequences)
        report = chooser.report()
        shapes = [round_.shape for round_ in seen if round_.shape is not None]
        assert [shape.seconds for shape in shapes] == [report["round_s"][shape.tree or "plain"] for shape in shapes]
        assert sum(shape.seconds or 0.0 for shape in shapes) == pytest.approx(report["predicted_s"])
        assert all(shape.tokens == 1.0 for shape in shapes if shape.tree is None)
        assert max(report["rounds"], key=lambda name: report["rounds"][name]) == shape
        assert report["round_s"] == pytest.approx({"plain": 1.0, "4/2/1": tree_s, "7/1/3": 2.0})
        assert report["source"] == f"{file} (measured with another batch)"
    assert texts[0] == texts[1]


def test_a_round_is_reported_with_its_shape() -> None:
    """Predictions of the costs only where these decided; a tree that was asked for has none."""
    (method, params), nothing = menu(), jnp.zeros((1,), bool)
    run = object.__new__(Run)
    run.rounds_of = [0, 0, 0]
    table = CostTable(TREES, ((1.0,), (2.0,), (3.0,)), ((1.0,),) * 3, "p.json", SETTINGS)
    chooser = Chooser(method, params, run, FastPrograms(), SETTINGS, known_by(table, SETTINGS, {}))
    seen: list[RoundInfo] = []
    report = with_shapes(lambda number, info: seen.append(info), "auto", chooser)
    assert report is not None
    for shape, decides in ((0, False), (2, False), (2, True), (0, True), (1, True)):
        run.rounds_of[shape] += 1
        chooser.decides = decides
        report(0, RoundInfo(nothing, nothing[None, None], nothing[None, None], expected=jnp.float32(1.5)))
    assert [one.shape for one in seen] == [
        RoundShape(None), RoundShape("7/1/3"), RoundShape("7/1/3", 3.0, 1.5), RoundShape(None, 1.0, 1.5),
        RoundShape("4/2/1", 2.0, 1.5),
    ]  # fmt: skip
    fixed = with_shapes(lambda number, info: seen.append(info), TREES[1], None)
    assert fixed is not None and with_shapes(None, "auto", chooser) is None
    fixed(0, seen[0])
    assert seen[-1].shape == RoundShape("7/1/3")


def test_a_trace_has_the_shape_of_every_round() -> None:
    one = jnp.ones((1, 1), jnp.int32)
    tree, accepted = Tree(one, one - 2, jnp.zeros((1, 1))), Accepted(one - 1, one[0], one[0])
    info = RoundInfo(one[0] > 0, one[None] > 0, one[None] > 0, tree, accepted)
    (plain,) = round_records(3, info._replace(shape=RoundShape(None, 0.25, 1.0)))
    assert (plain["shape"], plain["predicted_s"], plain["predicted_tokens"]) == (None, 0.25, 1.0)
    (drafted,) = round_records(3, info._replace(shape=RoundShape("60/7/10")))
    assert (drafted["shape"], drafted["predicted_s"], drafted["predicted_tokens"]) == ("60/7/10", None, None)


def test_measured_costs_are_known_where_there_is_no_table() -> None:
    assert known_by("auto", {}, known := {}) is known


def test_a_profile_without_costs_is_a_profile(tmp_path: Path) -> None:
    write_profile(tmp_path / "p.json", TREES[0], None, {"device": "cpu"})
    assert read_profile(tmp_path / "p.json") == {"tree": TREES[0], "budget": None}
    with pytest.raises(RequestError, match="expected costs of rounds in .*p.json.* tune again"):
        read_costs(tmp_path / "p.json")


def test_costs_under_another_budget_do_not_decide(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="expected costs of rounds under a budget of 7"):
        read_costs(written(tmp_path / "p.json", ROUNDS, BudgetConfig(7)))


TABLE = {"identity": {"budget": None}, "shapes": ["plain", "4/2/1"], "seconds": [[1.0], [2.0]], "tokens": [[1.0], [2]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": ["4/2/1", "plain"]}, "plain first"),
        ({"shapes": ["plain"]}, "as many lists"),
        ({"shapes": ["plain", "4/2"]}, "unpack"),
        ({"shapes": ["plain", "4/2/one"]}, "invalid literal"),
        ({"shapes": ["plain", "99/2/1"]}, "tree size of at most"),
        ({"seconds": [[1.0], [0.0]]}, "above 0"),
        ({"seconds": [[1.0], ["2"]]}, "above 0"),
        ({"tokens": [[1.0], [float("nan")]]}, "above 0"),
        ({"tokens": [[1.0], []]}, "a measurement of every shape"),
        ({"seconds": 5}, "int"),
        ({"identity": {}}, "budget"),
        ({"identity": {"budget": {"experts": "8"}}}, "expected numbers"),
    ],
)
def test_what_are_no_costs_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"format": FORMAT, "tree": None, "budget": None, "costs": [TABLE | change]}))
    with pytest.raises(RequestError, match=words) as refused:
        read_costs(file)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


def test_costs_that_are_no_list_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"format": FORMAT, "tree": None, "budget": None, "costs": 5}))
    with pytest.raises(RequestError, match="expected costs of rounds in"):
        read_costs(tmp_path / "p.json")


def test_a_table_is_a_value() -> None:
    tables = [CostTable(TREES, ((1.0,),) * 3, ((1.0,),) * 3, "p.json", dict(SETTINGS)) for _ in range(2)]
    assert DecodingSpec(tables[0]) == DecodingSpec(tables[1]) and len(set(tables)) == 1
    assert DecodingSpec(tables[0]).chooses and DecodingSpec(tables[0]).name == "auto"


@pytest.mark.parametrize(
    ("budget", "more", "words"),
    [
        (BudgetConfig(2), [], "expected costs of rounds under a budget of 2"),
        (None, ["--expert-budget", "2"], "expected a budget either from --profile"),
        (None, ["--tree-depth", "2"], "expected --speculate auto or the tree of flags"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, budget: BudgetConfig | None, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = str(written(tmp_path / "p.json", ROUNDS, budget))
    assert main(["--prompt-ids", "5,6,7", "--speculate", "auto", "--profile", profile, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_command_chooses_by_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*write_pair(tmp_path, 30), "--prompt-ids", "5,6,7", "--compilation-cache", "none"]
    plain = run_json(capsys, *flags[:2], *flags[4:], "--draft-model", "none")
    profile = str(written(tmp_path / "p.json", ROUNDS))
    auto = run_json(capsys, *flags, "--speculate", "auto", "--profile", profile)
    assert auto["prompts"][0]["token_ids"] == plain["prompts"][0]["token_ids"] and auto["exact"]
    assert auto["choice"]["source"].startswith(f"{profile} (measured with another model")
    assert auto["choice"]["round_s"] == pytest.approx({"plain": 0.9, "4/2/1": 1.4, "7/1/3": 2.0})
