"""Drafters by name: the text of plain decoding, named in results, and refused in one line where they do not fit."""

import dataclasses
from pathlib import Path
from types import ModuleType

import jax
import pytest
from own_mesh import block_head
from tiny import write_tiny
from tiny_pair import run_json

from benchmarks import acceptance, speculation
from moespec_jax import TreeConfig, load
from moespec_jax.checkpoint.read import load_config
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.errors import RequestError
from moespec_jax.generate import main
from moespec_jax.runtime.drafters import NAMES, NGRAM_TREE, described, named_draft

IDS = ["--prompt-ids", "5,6,7,8,5,6,7", "--prompt-ids", "9,9,9"]
HEADS = ["owner/ngram", "./ngram", "ngrams", "none", "NGRAM", "self/head", "./self:1", "C:\\heads\\ngram"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("target"), tokenizer=False)


@pytest.mark.parametrize("name", HEADS)
def test_other_names_are_those_of_heads(target: Path, name: str) -> None:
    assert named_draft(name, load_config(target)) is None


REFUSED = {
    "ngram:4": "ngram without an argument",
    "self:0": "1 to 2 experts a token",
    "self:3": "1 to 2 experts a token",
    "self:x": "got self:x",
    "self:-1": "got self:-1",
    "self:1.5": "got self:1.5",
    "self:": "got self:",
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused(target: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = REFUSED[name]
    with pytest.raises(RequestError, match=expected):
        load(target, name)
    assert main(["--model", str(target), "--draft-model", name, *IDS]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize("flags", [["--draft-revision", "main"], ["--draft-boundaries", "1,2"]], ids=str)
def test_a_name_has_no_files(target: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(target), "--draft-model", "ngram", *flags, *IDS]) == 2
    assert "ngram has no files" in capsys.readouterr().err


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("name", ["ngram", pytest.param("self:1", marks=pytest.mark.slow)])
def test_the_command_drafts_by_name(target: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(target), "--max-new-tokens", "20", "--ignore-eos", *IDS]
    plain = run_json(capsys, *flags)
    drafted = run_json(capsys, *flags, "--draft-model", name)
    assert [p["token_ids"] for p in drafted["prompts"]] == [p["token_ids"] for p in plain["prompts"]]
    assert drafted["draft_model"] == name and drafted["exact"] and plain["draft_model"] is None
    assert main([*flags, "--draft-model", name]) == 0
    err = capsys.readouterr().err
    assert f"draft        {name}; " in err and not err.startswith("\n\n")


def test_a_name_stands_in_place_of_a_head(target: Path) -> None:
    model = load(target, "ngram")
    assert "drafter ngram" in repr(model) and model.speculative_params.draft == ()
    assert model.resolve(DecodingSpec("default")).tree == NGRAM_TREE
    assert [described(name) for name in ("ngram", "a/head", None)] == [
        "drafter ngram",
        "draft head a/head",
        "no draft head",
    ]
    with pytest.raises(RequestError, match=NAMES):
        load(target).generate([[1]], tree=TreeConfig())


def test_a_target_without_experts_does_not_draft_itself(target: Path) -> None:
    dense = dataclasses.replace(load_config(target), sparse_layers=(False, False))
    assert named_draft("ngram", dense) is not None
    with pytest.raises(RequestError, match="a target with experts"):
        named_draft("self", dense)
    drafts = named_draft("self", load_config(target))
    assert drafts is not None and drafts.name == "self:1"


@pytest.mark.parametrize("benchmark", [acceptance, speculation])
def test_benchmarks_of_trees_refuse_a_head_that_drafts_chains(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is one line, before anything is measured."""
    target = write_tiny(tmp_path / "target", num_hidden_layers=3, tokenizer=False)
    model = load(target, block_head(tmp_path, str(target)))
    monkeypatch.setattr(benchmark, "load", lambda **_: model)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    assert benchmark.main(["--draft-model", "a block head"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: expected a chain (top-k 1)")
