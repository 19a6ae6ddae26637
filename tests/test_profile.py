"""Profiles come back as they were written, generate as flags do, and are refused in one line where they are not."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import run_json, write_pair

from moespec_jax import BudgetConfig, RequestError, TreeConfig, read_profile
from moespec_jax.generate import main
from moespec_jax.runtime.tuned_profile import FORMAT, setting_fields, write_profile

TREE, BUDGET = TreeConfig(2, 3, 8), BudgetConfig(6, anchor="root", min_kept_weight=0.3)


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("budget", [None, BUDGET, BudgetConfig(0.25), BudgetConfig((4, 6, 8))])
def test_it_comes_back_as_it_was_written(tmp_path: Path, budget: BudgetConfig | None) -> None:
    write_profile(tmp_path / "p.json", TREE, budget, {"device": "cpu"})
    assert read_profile(tmp_path / "p.json") == {"tree": TREE, "budget": budget}
    assert json.loads((tmp_path / "p.json").read_text())["device"] == "cpu"


def test_a_profile_with_older_names_is_read(tmp_path: Path) -> None:
    budget = {"experts": [4, 6, 8], "coverage": "guarantee", "anchor": "none", "guarantee": 0.0, "faithfulness": 0.5}
    (tmp_path / "p.json").write_text(json.dumps({"format": FORMAT, "tree": {"depth": 2}, "budget": budget}))
    expected = BudgetConfig((4, 6, 8), anchor="likely", anchor_probability=0.0, min_kept_weight=0.5)
    assert read_profile(tmp_path / "p.json") == {"tree": TreeConfig(2), "budget": expected}


LOSSY = [(TreeConfig(4, 4, 16), BudgetConfig(8), 0.04, 900.0), (TREE, BUDGET, 0.01, 700.0)]


def timed(setting: TreeConfig | None, budget: BudgetConfig | None, kl: float | None, speed: float) -> dict[str, Any]:
    loss = None if kl is None else {"kl": kl, "top1": 0.9}
    return setting_fields(setting, budget) | {"exact": kl is None, "loss": loss, "tokens_per_s": {"median": speed}}


def written(file: Path, *rows: dict[str, Any]) -> Path:
    write_profile(file, TREE, None, {"finalists": list(rows)})
    return file


@pytest.mark.parametrize(
    ("max_kl", "expected"),
    [(0.04, LOSSY[0]), (0.0399, LOSSY[1]), (1, LOSSY[0]), (0.0, (TREE, None)), (0.009, (TREE, None))],
)
def test_the_fastest_setting_within_a_divergence_is_read(tmp_path: Path, max_kl: float, expected: Any) -> None:
    """Exact settings have none; the profile's own setting does not matter."""
    lossy = [timed(*setting) for setting in LOSSY]
    file = written(tmp_path / "p.json", *lossy, timed(None, None, None, 500.0), timed(TREE, None, None, 600.0))
    assert read_profile(file) == {"tree": TREE, "budget": None}
    assert read_profile(file, max_kl=max_kl) == {"tree": expected[0], "budget": expected[1]}


def test_an_exact_setting_that_is_faster_is_taken(tmp_path: Path) -> None:
    file = written(tmp_path / "p.json", timed(*LOSSY[1]), timed(None, None, None, 701.0))
    assert read_profile(file, max_kl=0.5) == {"tree": None, "budget": None}


@pytest.mark.parametrize(
    ("rows", "max_kl", "words"),
    [
        ([timed(*LOSSY[0]), timed(*LOSSY[1])], 0.005, "divergence 0.005 or less in .* the least is 0.01"),
        ([], 0.1, "expected the settings that were timed"),
        ([{"setting": "plain", "exact": True, "tokens_per_s": {"median": 1.0}}], 0.1, "tune again"),
        ([timed(*LOSSY[0])], -0.1, "at least 0 nats"),
        ([timed(*LOSSY[0])], float("nan"), "at least 0 nats"),
        ([timed(*LOSSY[0])], float("inf"), "at least 0 nats"),
        ([timed(*LOSSY[0])], True, "expected max_kl as a number"),
        ([timed(*LOSSY[0]) | {"loss": None}], 0.1, "expected timed settings"),
        ([timed(*LOSSY[0]) | {"loss": {"kl": float("nan")}}], 0.1, "expected a number of at least 0"),
        ([timed(*LOSSY[0]) | {"tokens_per_s": {"median": "9"}}], 0.1, "expected a number of at least 0"),
        ([timed(*LOSSY[0]) | {"tree": 5}], 0.1, "expected a tree and a budget"),
        ([5], 0.1, "expected timed settings"),
    ],
)
def test_no_setting_within_a_divergence_is_one_line(tmp_path: Path, rows: Any, max_kl: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        read_profile(written(tmp_path / "p.json", *rows), max_kl=max_kl)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_a_divergence_needs_a_profile(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = importlib.import_module(f"moespec_jax.{command}" + ("" if command == "generate" else ".__main__"))
    assert run.main(["--max-kl", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "expected --profile with it" in said and said.count("\n") == 1


@pytest.mark.slow
def test_generate_decodes_as_its_flags_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [*write_pair(tmp_path, 12, num_experts=12), "--prompt", "the cat"]
    flags = ["--tree-depth", "2", "--tree-top-k", "3", "--tree-size", "8", "--expert-budget", "6"]
    flags += ["--budget-anchor", "root", "--budget-min-kept-weight", "0.3"]
    write_profile(tmp_path / "p.json", TREE, BUDGET, {})
    profiled = run_json(capsys, *pair, "--profile", str(tmp_path / "p.json"))
    flagged = run_json(capsys, *pair, *flags)
    for name in ("tree", "budget", "exact", "prompts"):
        assert profiled[name] == flagged[name]
    chosen = written(tmp_path / "several.json", *(timed(*setting) for setting in LOSSY))
    within = run_json(capsys, *pair, "--profile", str(chosen), "--max-kl", "0.02")
    assert not within["exact"] and within["budget"] == flagged["budget"] and within["prompts"] == flagged["prompts"]
    write_profile(tmp_path / "plain.json", None, None, {})
    assert run_json(capsys, *pair, "--profile", str(tmp_path / "plain.json"))["tree"] is None
    assert main([*pair, "--profile", str(tmp_path / "p.json"), "--tree-depth", "2"]) == 2
    assert "either from --profile or from flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected a file"),
        ("{}", "expected a profile of format"),
        (json.dumps({"format": FORMAT, "tree": {"depth": 1}}), "'budget'"),
        (json.dumps({"format": FORMAT, "tree": {"depth": 1.5}, "budget": None}), "expected a whole number"),
        (json.dumps({"format": FORMAT, "tree": {"dept": 1}, "budget": None}), "dept"),
        (json.dumps({"format": FORMAT, "tree": {"depth": 9999, "size": 9999}, "budget": None}), "at most 1024 tokens"),
        (json.dumps({"format": FORMAT, "tree": {"top_k": 9999}, "budget": None}), "at most 65536 drafted ones"),
        (json.dumps({"format": FORMAT, "tree": [], "budget": None}), "expected a tree and a budget"),
        (json.dumps({"format": FORMAT, "tree": {}, "budget": {"experts": "8"}}), "expected numbers"),
        (json.dumps({"format": FORMAT, "tree": None, "budget": {"experts": 8}}), "expected a tree with the budget"),
        (json.dumps({"format": FORMAT, "tree": {}, "budget": {"experts": 8, "mass": 2}}), "mass"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "p.json").write_text(text)
    with pytest.raises(RequestError, match=words):
        read_profile(tmp_path / "p.json")
