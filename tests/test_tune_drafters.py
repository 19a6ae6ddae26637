"""Tuning of drafters other than EAGLE-3 heads: their trees, which are all timed, and the choice among them."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dflash_oracle
import pytest
from dflash_files import speculators_fields, write_block_head
from test_tune import DENSE
from tiny import write_tiny

from moespec_jax import TreeConfig, load, read_profile
from moespec_jax.bench.sweep import TREES, trees_of
from moespec_jax.checkpoint.read import load_config
from moespec_jax.cli import arguments
from moespec_jax.errors import RequestError
from moespec_jax.runtime.model import Model
from moespec_jax.tune import search as searching
from moespec_jax.tune.__main__ import main
from moespec_jax.tune.candidates import NGRAM_TREES, grid, search_space
from moespec_jax.tune.cost import Measured
from moespec_jax.tune.round_times import Timed

pytestmark = pytest.mark.usefixtures("fast_compile")
CHAINS = [TreeConfig(depth, 1, depth + 2) for depth in range(5)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny target of 12 experts, and what drafts for it: a DSpark head of a block of 5, and names."""
    directory = tmp_path_factory.mktemp("drafters")
    target = write_tiny(directory / "target", num_hidden_layers=4, num_experts=12)
    changes = dict(boundaries=(1, 2, 3), draft_vocab_size=300)
    config = dflash_oracle.config_for(load_config(target), **(dflash_oracle.VARIANTS["vanilla"] | changes))
    head = write_block_head(directory / "head", speculators_fields(config), config, dflash_oracle.head_of(config))
    return {"target": str(target), "block": str(head), "ngram": "ngram", "self": "self:1"}


@pytest.fixture(scope="module")
def models(files: dict[str, str]) -> dict[str, Model]:
    return {name: load(files["target"], files[name], backend=DENSE) for name in ("block", "ngram", "self")}


def test_each_drafter_has_trees_of_its_own(models: dict[str, Model]) -> None:
    drafts = {name: model.draft for name, model in models.items()}
    assert drafts["block"] is not None and drafts["ngram"] is not None and drafts["self"] is not None
    assert search_space(drafts["block"], None, None, None) == CHAINS
    assert search_space(drafts["ngram"], None, None, None) == list(NGRAM_TREES)
    assert search_space(drafts["self"], None, None, None) == CHAINS[:4]
    assert len({tree.name for tree in NGRAM_TREES}) == len(NGRAM_TREES)
    # As far as the drafter drafts what is asked for.
    assert search_space(drafts["block"], 9, None, None) == CHAINS
    assert search_space(drafts["self"], 1, [1, 2], [6]) == grid(1, [1, 2], [6])
    for name, (flags, count) in {"block": ((2, [2], [6]), 0), "ngram": ((7, None, None), 112)}.items():
        with pytest.raises(RequestError, match=f"expected 1 to 32 trees .* are timed; got {count}"):
            search_space(cast(Any, drafts[name]), *flags)
    assert list(trees_of(drafts["block"])) == ["3/1/1", "4/2/1", "6/4/1"]
    assert trees_of(drafts["ngram"]) == trees_of(None) == TREES


def test_all_trees_are_anchors_and_their_candidates_are_as_measured(models: dict[str, Model]) -> None:
    anchors, budgeted = searching.anchors_of(models["block"], CHAINS)
    assert set(CHAINS) <= set(anchors) and budgeted == [CHAINS[2], CHAINS[4]]
    assert searching.anchors_of(models["block"], CHAINS[:1])[1] == CHAINS[:1]
    measured = [Measured(CHAINS[0], 4.0, 1.0), Measured(CHAINS[1], 5.0, 1.1), Measured(CHAINS[1], 2.0, 0.9, True)]
    spec, lossy = (lambda tree, budget=None: cast(Any, SimpleNamespace(tree=tree, budget=budget))), cast(Any, "B")
    timed = [
        Timed(spec(None), [1.0], [1.0]),
        Timed(spec(CHAINS[0]), [1.0], [1.5]),
        Timed(spec(CHAINS[1]), [1.1], [1.8]),
    ]
    timed.append(Timed(spec(CHAINS[1], lossy), [0.9], [1.2]))
    found = searching._timed_trees(CHAINS[:2], measured, timed)
    assert [(c.name, c.accept_length, c.experts, c.round_s) for c in found] == [
        ("3/1/1", 1.8, 5.0, 1.1),
        ("2/0/1", 1.5, 4.0, 1.0),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "ngram", "self"])
def test_a_search_chooses_what_measured_fastest_and_the_profile_is_taken(
    files: dict[str, str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(arguments, "load", functools.partial(load, backend=DENSE))
    monkeypatch.setattr(searching, "FINALISTS", 2)
    monkeypatch.setattr(searching, "ANCHOR_REPEATS", 1)
    monkeypatch.setattr(searching, "LOSSY_RULES", {"path, squares": {}})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat sat\ndef add(a, b):\n")
    argv = ["--model", files["target"], "--draft-model", files[name], "--prompts", f"mine={prompts}", "--count", "2"]
    argv += ["--tokens", "10", "--longest-prompt", "12", "--tree-depth", "1", "--tree-top-ks", "1", "--budgets", "0.25"]
    argv += ["--repeats", "1", "--max-kl", "5", "--output", str(tmp_path / "tuned")]
    assert main(argv) == 0
    first = capsys.readouterr().out
    profile = json.loads((tmp_path / "tuned" / "profile.json").read_text())
    measured = {row["setting"]: row["tokens_per_s"]["median"] for row in profile["finalists"]}
    assert profile["chosen"]["setting"] == max(measured, key=lambda one: measured[one])
    # Two chains, and those that read more than 3 experts under a budget; n-grams find no match, and draft roots.
    assert profile["considered"] - 2 in ((0,) if name == "ngram" else (1, 2))
    assert name == "block" or profile["draft_model"] == files[name]
    chosen = read_profile(tmp_path / "tuned" / "profile.json")
    assert chosen["tree"] in (None, *CHAINS[:2])
    # A finished search is not measured again.
    assert main(argv) == 0 and capsys.readouterr().out == first
    assert dataclasses.is_dataclass(chosen["tree"]) or chosen["tree"] is None
