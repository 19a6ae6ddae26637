"""Profiles come back as they were written, generate as flags do, and are refused in one line where they are not."""

import json
from pathlib import Path

import pytest
from tiny_pair import run_json, write_pair

from moespec_jax import BudgetConfig, RequestError, TreeConfig, read_profile
from moespec_jax.generate import main
from moespec_jax.runtime.tuned_profile import FORMAT, write_profile

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
