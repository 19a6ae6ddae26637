"""The command line with an expert budget: what is reported of it, what is refused, and what is warned about."""

import json
from pathlib import Path

import pytest
from tiny_pair import run_json, write_pair

from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.errors import RequestError
from moespec_jax.generate import main
from moespec_jax.runtime.load import load

NEW = 24
PROMPTS = ["--prompt", "the cat", "--prompt", "def add(a"]
TREE = ["--tree-depth", "3", "--tree-top-k", "8", "--tree-size", "40"]


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a target of 12 experts, 2 for a token, and of its head."""
    return write_pair(tmp_path_factory.mktemp("pair"), NEW, num_experts=12)


def test_a_run_reports_what_the_budget_cost(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.jsonl"
    result = run_json(capsys, *pair, *PROMPTS, *TREE, "--expert-budget", "0.5", "--trace", str(file))
    assert result["exact"] is False
    assert result["budget"]["experts"] == [6, 6, 6] and result["budget"]["coverage"] == BudgetConfig.coverage
    assert result["experts_read"] <= 6 < result["experts_wanted"]
    assert 0.4 < result["mass_kept"] < 1 and 0 < result["tokens_replaced"] < 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    by_round: dict[int, list[float]] = {}
    for line in lines:
        for shortlist, experts in zip(line["shortlist"], line["experts"], strict=True):
            assert len(set(shortlist)) == len(shortlist) == 6 and set(experts) <= set(shortlist)
        assert all(0 < kept <= 1 for kept in line["mass_kept"])
        by_round[line["round"]] = line["mass_kept"]
    means = [sum(kept) / 3 for kept in by_round.values()]
    assert result["mass_kept"] == pytest.approx(sum(means) / len(means), abs=1e-5)


@pytest.mark.slow
def test_people_see_that_it_is_lossy(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, *PROMPTS[:2], *TREE, "--expert-budget", "6", "--compare"]) == 0
    said = capsys.readouterr().err
    for words in (
        "LOSSY",
        "of 12 read per layer and pass",
        "selected",
        "lost an expert",
        "of exact speculation's",
        "same",
    ):
        assert words in said


@pytest.mark.slow
def test_all_experts_is_exact_and_the_text_the_same(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    free, limited = (run_json(capsys, *pair, *PROMPTS, *TREE, *flags) for flags in ([], ["--expert-budget", "1.0"]))
    assert limited["exact"] and free["budget"] is None and limited["budget"]["experts"] == [12, 12, 12]
    assert [p["token_ids"] for p in limited["prompts"]] == [p["token_ids"] for p in free["prompts"]]


PRUNING_FLAGS = {
    "now": "--budget-anchor likely --budget-anchor-probability 0 --budget-min-kept-weight 1",
    "older names": "--budget-policy guarantee --budget-guarantee 0 --budget-faithfulness 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", PRUNING_FLAGS.values(), ids=PRUNING_FLAGS)
def test_a_budget_that_prunes_every_loss_is_exact(
    pair: list[str], flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run_json(capsys, *pair[:2], *pair[4:], *PROMPTS[:2])
    result = run_json(capsys, *pair, *PROMPTS[:2], *TREE, "--expert-budget", "4", *flags.split())
    assert result["exact"] and result["experts_read"] <= 4
    assert result["prompts"][0]["token_ids"] == plain["prompts"][0]["token_ids"]
    rule = {name: result["budget"][name] for name in ("coverage", "anchor", "anchor_probability", "min_kept_weight")}
    assert rule == {"coverage": "substitute", "anchor": "likely", "anchor_probability": 0.0, "min_kept_weight": 1.0}


@pytest.mark.slow
def test_layers_can_differ(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, *pair, *PROMPTS, *TREE, "--expert-budget", "4,1.0,6", "--budget-size", "mass")
    assert result["budget"]["experts"] == [4, 12, 6] and result["budget"]["size"] == "mass"


REFUSED = {
    "below k": (["--expert-budget", "1"], "expected an expert budget from 2 to 12"),
    "above N": (["--expert-budget", "13"], "expected an expert budget from 2 to 12"),
    "fraction below k": (["--expert-budget", "0.1"], "expected an expert budget from 0.166667 to 1"),
    "fraction above 1": (["--expert-budget", "1.5"], "got 1.5"),
    "zero": (["--expert-budget", "0"], "got 0"),
    "not a number": (["--expert-budget", "many"], "expected --expert-budget as a number of experts (16)"),
    "nan": (["--expert-budget", "nan"], "expected --expert-budget as a number"),
    "too few layers": (["--expert-budget", "4,4"], "one for each of 3 sparse layers; got 2"),
    "rule without budget": (["--budget-score", "path"], "--budget-score is part of a budget"),
    "unknown rule": (["--expert-budget", "6", "--budget-policy", "drop"], "invalid choice: 'drop'"),
    "mass above 1": (["--expert-budget", "6", "--budget-mass", "2"], "budget's mass from 0 to 1, got 2.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_budgets_are_one_line(pair: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = REFUSED[name]
    assert main([*pair, *PROMPTS, *TREE, *flags]) == 2
    out, err = capsys.readouterr()
    # Before the model is read, which may take minutes, and before anything is said of it.
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_budget_without_a_head_is_refused(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair[:2], *pair[4:], *PROMPTS, "--expert-budget", "6"]) == 2
    assert "--expert-budget needs a draft head" in capsys.readouterr().err
    with pytest.raises(RequestError, match="this is plain decoding"):
        load(pair[1]).generate("the cat", budget=6)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="budget's score of probability, path, depth, or a function; got 'luck'"):
        BudgetConfig(6, score="luck")


@pytest.mark.slow
def test_tight_budgets_are_warned_about(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, *PROMPTS[:2], *TREE, "--expert-budget", "3"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "below twice the 2 experts of one token" in warned[0]
    with pytest.warns(UserWarning, match="below twice"):
        load(pair[1], pair[3]).generate("the cat", max_new_tokens=4, budget=BudgetConfig(3))
