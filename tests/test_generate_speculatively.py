"""The command line with a draft head: the same text, figures that fit, and a trace that tells the same story."""

import json
from pathlib import Path

import pytest
from tiny_pair import run_json, write_pair

from moespec_jax.config import TreeConfig
from moespec_jax.generate import main
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.load import DEMO_DRAFT, load

NEW = 24
PROMPTS = ["--prompt", "the cat", "--prompt", "def add(a"]


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a tiny target and a random head for it, in SpecForge's format."""
    return write_pair(tmp_path_factory.mktemp("pair"), NEW)


TREE = ["--tree-depth", "3", "--tree-top-k", "8", "--tree-size", "40"]


def test_the_text_is_plain_decoding_s_and_the_figures_fit(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plain = run_json(capsys, *pair[:2], *pair[4:], *PROMPTS)
    result = run_json(capsys, *pair, *PROMPTS, *TREE)
    assert result["tree"] == {"depth": 3, "top_k": 8, "size": 40} and result["draft_model"] == pair[3]
    assert result["exact"] and result["simulated_accept_length"] is None
    for prompt, before in zip(result["prompts"], plain["prompts"], strict=True):
        assert prompt["token_ids"] == before["token_ids"]
        assert prompt["accept_length"] == pytest.approx(1 + sum(prompt["accepted_by_depth"]))
        # The last round may have accepted more than there was room for.
        assert 1 + prompt["rounds"] * prompt["accept_length"] >= prompt["new_tokens"] - 1e-6
        assert before["rounds"] == NEW - 1 and before["accept_length"] == 1.0


def test_a_trace_tells_the_same_story(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replayed from the root, every round's accepted nodes and bonus give the tokens of the result."""
    file = tmp_path / "trace.jsonl"
    result = run_json(capsys, *pair, *PROMPTS, *TREE, "--trace", str(file))
    assert [p.name for p in tmp_path.iterdir()] == ["trace.jsonl"]
    told: list[list[int]] = [[], []]
    experts = 0
    for line in map(json.loads, file.read_text().splitlines()):
        tokens, parents = line["tokens"], line["parents"]
        assert len(tokens) == len(parents) == len(line["scores"]) == 40
        assert (tokens[0], parents[0], line["scores"][0]) == (line["root"], -1, 0.0)
        assert all(0 <= parent < node for node, parent in enumerate(parents) if node)
        sequence = told[line["sequence"]]
        assert not sequence or sequence[-1] == line["root"]
        for node, before in zip(line["accepted"], [0, *line["accepted"]], strict=False):
            assert parents[node] == before
        told[line["sequence"]] = (sequence or [line["root"]]) + [tokens[n] for n in line["accepted"]] + [line["bonus"]]
        assert line["shortlist"] is None and line["mass_kept"] == [1.0] * 3 and len(line["experts"]) == 3
        assert all(layer == sorted(set(layer)) and 2 <= len(layer) <= 4 for layer in line["experts"])
        experts += 1
    for sequence, prompt in zip(told, result["prompts"], strict=True):
        assert sequence[:NEW] == prompt["token_ids"]
    assert experts == sum(prompt["rounds"] for prompt in result["prompts"])


def test_a_trace_that_cannot_be_written_is_one_line(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pair, *PROMPTS, "--json", "--trace", str(tmp_path / "no" / "trace.jsonl")]) == 2
    assert "expected to write a trace" in capsys.readouterr().err


@pytest.mark.slow
def test_simulated_acceptance_is_marked_everywhere(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, *pair, *PROMPTS, *TREE, "--simulate-accept-length", "2")
    assert result["exact"] is False and result["simulated_accept_length"] == 2.0
    assert main([*pair, *PROMPTS[:2], *TREE, "--simulate-accept-length", "2"]) == 0
    assert "SIMULATED" in capsys.readouterr().err


@pytest.mark.slow
def test_people_see_boundaries_acceptance_and_comparison(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pair, *PROMPTS[:2], "--compare"]) == 0
    said = capsys.readouterr().err
    for words in (
        "boundaries 1, 2, 3",
        "exact, speculative decoding",
        "tokens a round; by depth",
        ") of plain decoding's",
        "100.0%",
    ):
        assert words in said


@pytest.mark.slow
def test_python_decodes_both_ways(pair: list[str]) -> None:
    model = load(pair[1], pair[3])
    drafted = model.generate("the cat", max_new_tokens=NEW)
    plain = model.generate("the cat", max_new_tokens=NEW, tree=None)
    assert drafted.tree is not None and plain.tree is None
    assert drafted.prompts[0].text == plain.prompts[0].text


@pytest.mark.slow
@pytest.mark.skipif(not Path(DEMO_DRAFT).exists(), reason="the embedded head is not there")
def test_the_embedded_pair_is_exact_and_its_head_is_good() -> None:
    """Chain and branched tree in float32; the head was measured at above 2.5 with either, far above chance."""
    model = load(dtype="float32")
    prompts = ["import os\n\n\ndef ", "class Parser:\n    def __init__(self"]
    plain = model.generate(prompts, max_new_tokens=100, tree=None, ignore_eos=True)
    for tree in (TreeConfig(4, 1, 6), TreeConfig(3, 4, 16)):
        drafted = model.generate(prompts, max_new_tokens=100, tree=tree, ignore_eos=True)
        assert [p.token_ids for p in drafted.prompts] == [p.token_ids for p in plain.prompts]
        assert sum(p.accept_length for p in drafted.prompts) / 2 > 2.0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["switch", "slots"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bfloat16_decodes_too(pair: list[str], backend: str, temperature: float) -> None:
    """Under strict promotion of dtypes; the first token comes from prefill, which both ways share."""
    model = load(pair[1], pair[3], dtype="bfloat16", backend=BACKENDS[backend])
    tree, options = TreeConfig(2, 3, 9), {"max_new_tokens": 12, "temperature": temperature, "ignore_eos": True}
    drafted = model.generate(["the cat", "def"], tree=tree, **options)
    plain = model.generate(["the cat", "def"], tree=None, **options)
    assert drafted.dtype == "bfloat16" and [p.new_tokens for p in drafted.prompts] == [12, 12]
    assert [p.token_ids[0] for p in drafted.prompts] == [p.token_ids[0] for p in plain.prompts]
