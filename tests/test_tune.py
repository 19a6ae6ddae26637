"""Tuning: acceptance replayed against decoding, the cost's fit against known prices, and the search end to end."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_pair import write_pair

from moespec_jax import TreeConfig, load, read_costs, read_profile
from moespec_jax.cli import arguments
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.prompt_sets import continued
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.model import Model
from moespec_jax.tune import search as searching
from moespec_jax.tune.__main__ import main
from moespec_jax.tune.candidates import Candidate, exact_candidates, grid, trees_for_budgets
from moespec_jax.tune.cost import Cost, Measured, fit, interpolate_experts, terms
from moespec_jax.tune.replay import path_ranks, replay
from moespec_jax.tune.search import Bound

# Smaller programs: which tree is taken does not depend on how experts are computed.
DENSE = Backend("dense", "flat", False, dense_experts)
NEW = 16
PROMPTS = [[5, 17, 9, 30, 2], [40, 41, 42, 7, 8, 9, 1], [3, 3, 3, 60]]
TREES = [TreeConfig(2, 3, 8), TreeConfig(2, 3, 5), TreeConfig(1, 3, 12), TreeConfig(0, 3, 4), TreeConfig(2, 3, 22)]


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a target of 12 experts, 2 for a token, and of its head."""
    return write_pair(tmp_path_factory.mktemp("pair"), NEW, num_experts=12)[:4]


@pytest.fixture(scope="module")
def model(pair: list[str]) -> Model:
    return load(pair[1], pair[3], backend=DENSE)


@pytest.mark.slow
def test_replayed_acceptance_is_that_of_decoding(model: Model) -> None:
    """Every tree of a width, from one pass over the model's own continuations."""
    texts = continued(model, PROMPTS, NEW + 3)
    ranks = path_ranks(model, texts, [len(p) for p in PROMPTS], 2, 3, NEW - 1)
    for tree in TREES:
        result = model.generate(PROMPTS, tree=tree, max_new_tokens=NEW, ignore_eos=True)
        rounds = np.array([p.rounds for p in result.prompts])
        by_depth = sum(np.array(p.accepted_by_depth) * p.rounds for p in result.prompts) / rounds.sum()
        replayed = replay(ranks, tree)
        np.testing.assert_allclose(replayed.accepted_by_depth, by_depth, atol=1e-12)
        assert replayed.accept_length == pytest.approx(1 + by_depth.sum())
    assert replay(ranks, TREES[-1]).accept_length > 1, "a tree that accepts nothing shows nothing"


def test_replay_goes_from_round_to_round() -> None:
    """Ranks by hand: a chain that is right at even positions only."""
    ranks = np.full((1, 6, 1, 1), 9)
    ranks[0, ::2] = 0
    replayed = replay(ranks, TreeConfig(0, 1, 2))
    # Rounds at 0, 2 and 4, each of which gains two.
    assert replayed == (2.0, [1.0])


def test_the_fit_finds_prices_that_are_there() -> None:
    prices = (2e-3, 1e-3, 0.0, 3e-5, 2e-4)
    trees = [*TREES, TreeConfig(0, 1, 2), TreeConfig(4, 1, 6), TreeConfig(7, 10, 60)]
    measured = [
        Measured(tree, experts, float(np.dot(prices, terms(tree, experts)))) for tree in trees for experts in (4.0, 9.0)
    ]
    found = fit(measured)
    np.testing.assert_allclose(found.prices, prices, atol=1e-9)
    assert max(map(abs, found.errors)) < 1e-6
    assert found.round_s(TreeConfig(3, 2, 8), 5.0) == pytest.approx(2e-3 + 4e-3 + 8 * 3e-5 + 1e-3)
    with pytest.raises(ValueError, match="expected measured settings"):
        fit([])


def test_a_grid_has_each_tree_once_and_none_that_cannot_be() -> None:
    trees = grid(3, [1, 2, 4], [4, 8, 16, 60])
    assert len(set(trees)) == len(trees)
    assert {(t.depth, t.size) for t in trees if t.top_k == 1} == {(0, 2), (1, 3), (2, 4), (3, 5)}
    assert all(t.size - 1 <= t.pool for t in trees)


def test_budgets_go_to_trees_that_want_more() -> None:
    cost = Cost((0.0, 0.0, 0.0, 0.0, 1e-3), ())
    small, large = TreeConfig(0, 1, 2), TreeConfig(2, 3, 8)
    exact = [Candidate("s", DecodingSpec(small), 1.5, 4.0, 4e-3), Candidate("l", DecodingSpec(large), 2.5, 10.0, 1e-2)]
    assert trees_for_budgets(exact, [5], cost, 3) == [large]
    assert trees_for_budgets(exact, [2, 5], cost, 3) == [large, small]


def test_exact_candidates_come_fastest_first() -> None:
    ranks = {1: np.zeros((1, 8, 2, 2), np.int64)}
    experts = interpolate_experts([Measured(TreeConfig(0, 1, 2), 4.0, 1.0), Measured(TreeConfig(2, 1, 4), 8.0, 1.0)])
    found = exact_candidates(grid(1, [1], []), ranks, experts, Cost((1e-3, 0.0, 0.0, 0.0, 1e-3), ()))
    assert [c.name for c in found] == ["3/1/1", "2/0/1"]
    assert found[0].experts == 6.0


def test_a_bound_is_kept() -> None:
    lossy = Candidate("", DecodingSpec(TREES[0], BudgetConfig(6)), 2.0, 6.0, 1.0, {"kl": 0.02, "top1": 0.97})
    assert Bound(max_kl=0.02).allows(lossy) and not Bound(max_kl=0.019).allows(lossy)
    assert Bound(min_agreement=0.97).allows(lossy) and not Bound(0.5, 0.98).allows(lossy)
    assert Bound().allows(lossy._replace(loss=None))


FLAGS = [
    "--count", "2", "--tokens", "10", "--longest-prompt", "12", "--tree-depth", "2", "--tree-top-ks", "1", "3",
    "--tree-sizes", "6", "--budgets", "0.5", "--repeats", "2",
]  # fmt: skip


def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "load", functools.partial(load, backend=DENSE))
    monkeypatch.setattr(searching, "FINALISTS", 3)
    monkeypatch.setattr(searching, "ANCHORS", [TreeConfig(0, 1, 2), TreeConfig(2, 3, 6)])
    monkeypatch.setattr(searching, "BUDGETED_ANCHORS", [TreeConfig(2, 3, 6)])
    monkeypatch.setattr(searching, "ANCHOR_REPEATS", 1)
    monkeypatch.setattr(searching, "LOSSY_RULES", {"path, squares": {}})


@pytest.mark.slow
def test_a_search_chooses_what_measured_fastest_and_continues_to_the_same(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_search(monkeypatch)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat sat\ndef add(a, b):\n")
    argv = [*pair, *FLAGS, "--prompts", f"mine={prompts}", "--max-kl", "5", "--output", str(tmp_path / "tuned")]
    assert main(argv) == 0
    first = capsys.readouterr().out
    files = {p.name: p.read_bytes() for p in (tmp_path / "tuned").iterdir()}
    assert set(files) == {"profile.json", "tune.jsonl", "tune.md", "tune.png"}
    profile = json.loads(files["profile.json"])
    measured = {row["setting"]: row["tokens_per_s"]["median"] for row in profile["finalists"]}
    assert profile["chosen"]["setting"] == max(measured, key=lambda name: measured[name])
    assert all(row["exact"] is (row.get("loss") is None) for row in profile["finalists"])
    assert {row["setting"] for row in profile["finalists"] if row["exact"]} >= {"plain"}
    chosen = read_profile(tmp_path / "tuned" / "profile.json")
    assert (chosen["tree"] is None) == (profile["chosen"]["setting"] == "plain")
    assert profile["chosen"]["setting"] in first or "Plain decoding is fastest" in first
    within = read_profile(tmp_path / "tuned" / "profile.json", max_kl=5.0)
    assert within == chosen, "the bound of the search"
    costs = read_costs(tmp_path / "tuned" / "profile.json")
    assert costs["budget"] == chosen["budget"] and costs["tree"].trees
    # Cut off in the middle of a line, the same command ends with the same bytes: what was measured is kept.
    lines = files["tune.jsonl"].splitlines(keepends=True)
    (tmp_path / "tuned" / "tune.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1])
    (tmp_path / "tuned" / "profile.json").unlink()
    assert main(argv) == 0
    assert capsys.readouterr().out == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "tuned").iterdir()} == files
    assert main([*argv, "--tokens", "11"]) == 2
    assert "new_tokens was 10, is 11" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--exact", "--max-kl", "0.1"], "either --exact or a bound"),
        (["--max-kl", "0"], "expected --max-kl above 0"),
        (["--min-agreement", "1.5"], "expected --min-agreement above 0 and up to 1"),
        (["--budgets", "2"], "expected --budgets as fractions"),
        (["--prompts", "nothing"], "NAME=FILE"),
        (["--tokens", "1"], "two tokens"),
    ],
)
def test_refusals_are_one_line(
    pair: list[str], flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair, *flags, "--output", str(tmp_path / "tuned")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err
    assert not (tmp_path / "tuned").exists()


def test_without_a_head_there_is_nothing_to_tune(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair[:2], "--output", str(tmp_path / "tuned")]) == 2
    assert "expected a draft head" in capsys.readouterr().err
