"""The command: its figures are those of plain passes, a killed run goes on to the same files, and what it refuses."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import cached_logits
from speculation import FastPrograms
from tiny import write_tiny
from tiny_pair import write_pair

from moespec_jax.cli import arguments
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.evaluate import accuracy
from moespec_jax.evaluate.__main__ import main
from moespec_jax.evaluate.report import within
from moespec_jax.measure.ledger import Ledger
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.tuned_profile import write_profile

pytestmark = pytest.mark.filterwarnings("ignore::moespec_jax.decoding.budget_config.BudgetWarning")

DENSE = Backend("dense", "flat", False, dense_experts)
FILES = ["evaluate.jsonl", "evaluate.md", "evaluate.png", "pieces.jsonl"]
LINES = ["def add(a, b): return a + b", "the cat sat on the mat and sat", "naïve café costs 5 € in 日本"]
TREE = ["--tree-size", "6", "--tree-depth", "2", "--tree-top-k", "2"]
# A random head's drafts are seldom taken, and by the default rule roots then lose little.
PAPER = ["--budget-score", "probability", "--budget-credit", "all"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Flags of a tiny pair, which is loaded once and whose programs are compiled quickly."""
    flags = write_pair(tmp_path_factory.mktemp("pair"), 8, num_experts=8, max_position_embeddings=160)[:4]

    @functools.cache
    def once(model: str, draft_model: str | None, **options: Any) -> Model:
        options = {name: value for name, value in options.items() if name not in ("check", "progress")}
        return dataclasses.replace(load(model, draft_model, **options | {"backend": DENSE}), programs=FastPrograms())

    def load_once(model: str, draft_model: str | None, **options: Any) -> Model:
        found = once(model, draft_model, **{n: v for n, v in options.items() if n != "check"})
        options["check"](found.config)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        patch.setattr(arguments, "load", load_once)
        yield flags


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Flags of texts and of questions."""
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("the cat\nimport os\ndef f(\n")
    rows = [{"turns": [f"What is {n}?"], "reference": [str(n)]} for n in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--texts", f"lines={tmp_path / 'lines.txt'}", "--prompts", f"mine={tmp_path / 'prompts.txt'}"]
    sizes = ["--tokens", "20", "--answer-tokens", "6", "--batch", "2"]
    return [*TREE, *sizes, *files, "--answers", str(tmp_path / "sums.jsonl")]


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "evaluate.jsonl").read_text().splitlines()]


def evaluate(tmp_path: Path, *argv: str, output: str = "out", expected: int = 0) -> list[dict[str, Any]]:
    assert main([*argv, "--output", str(tmp_path / output)]) == expected
    return rows_of(tmp_path / output) if expected == 0 else []


def nats(model: Model, ids: list[int], given: int) -> np.ndarray:
    """Negative log-likelihood of every token after the first root, by one plain pass."""
    logits = cached_logits(model.config, model.params, DENSE, np.array([ids], np.int32))[0]
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
    return np.array([-log_p[i, ids[i + 1]] for i in range(given, len(ids) - 1)])


@pytest.mark.slow
def test_figures_are_of_plain_passes(
    pair: list[str], given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluate(tmp_path, *pair, *given, "--expert-budget", "2", *PAPER)
    model = load(pair[1], pair[3], backend=DENSE)
    texts = [model.encode(line)[:84] for line in LINES]
    told = [nats(model, ids, min(64, len(ids) // 2)) for ids in texts]
    starts = [min(64, len(ids) // 2) + 1 for ids in texts]
    size = sum(len((model.decode(ids[n:], after=ids[:n]) or "").encode()) for ids, n in zip(texts, starts, strict=True))
    written = {row["way"]: row for row in rows if row["kind"] == "as written"}
    assert list(written) == ["6/2/2", "6/2/2, B = 2"]
    exact, lossy = written.values()
    assert exact["exact"] and exact["positions"] == sum(map(len, told)) and exact["texts"] == 3
    assert exact["perplexity"] == pytest.approx(math.exp(np.concatenate(told).mean()), rel=1e-4)
    assert exact["bits_per_byte"] == pytest.approx(np.concatenate(told).sum() / math.log(2) / size, rel=1e-4)
    assert abs(exact["kl"]) < 1e-6 and exact["top1"] == 1 and exact["nats_lost"] == 0
    assert not lossy["exact"] and lossy["kl"] > 0.01 and lossy["experts_read"] <= 2 < lossy["experts_wanted"]
    low, high = lossy["nats_lost_95"]
    assert low <= lossy["nats_lost"] <= high and lossy["budget"]["score"] == "probability"
    own = [row for row in rows if row["kind"] == "the target's own"]
    assert [row["set"] for row in own] == ["mine"] * 2 and own[0]["positions"] == 3 * 19
    assert all(row["versions"]["jax"] and row["device"] and row["dtype"] == "float32" for row in rows)
    out = capsys.readouterr().out
    assert out == (tmp_path / "out" / "evaluate.md").read_text() and out.count("LOSSY") == 3
    assert "score probability, credit all" in out and (tmp_path / "out" / "evaluate.png").stat().st_size > 10_000


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(
    pair: list[str], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after every task in turn, the last of them half written."""
    command = [*pair, *given, "--expert-budget", "2", *PAPER]
    evaluate(tmp_path, *command, output="whole")
    put, pieces = Ledger.put, tmp_path / "cut" / "pieces.jsonl"

    def killed(ledger: Ledger, name: str, value: Any) -> Any:
        put(ledger, name, value)
        raise Killed

    kills = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "put", killed)
            try:
                evaluate(tmp_path, *command, output="cut")
                break
            except Killed:
                kills += 1
        if kills == 4:
            pieces.write_bytes(pieces.read_bytes()[:-20])
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # Continuations in 2 batches, 2 ways along 2 sets of texts, 3 ways of answering in 3 batches; one of them twice.
    assert kills == 2 + 4 + 9 + 1
    before = (tmp_path / "whole" / "pieces.jsonl").read_bytes()
    evaluate(tmp_path, *command, "--tokens", "10", output="whole", expected=2)
    assert (tmp_path / "whole" / "pieces.jsonl").read_bytes() == before


def test_answers_are_counted_and_compared_with_plain_decodings(
    pair: list[str], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"plain": [0, 1, 2, 9, 9], "6/2/2": [0, 1, 2, 9, 9], "6/2/2, B = 2": [9, 9, 2, 3, 9]}

    def answered(model: Model, way: Any, prompts: list[list[int]], new: int, size: int) -> list[list[int]]:
        numbers = [int((model.decode(prompt) or "").split()[2].strip("?")) for prompt in prompts]
        return [model.encode(f"I think {said[way.name][number]}.") for number in numbers]

    monkeypatch.setattr(accuracy, "continue_batch", answered)
    alone = [flag for flag in given if flag not in ("--texts", "--prompts") and "=" not in flag]
    rows = evaluate(tmp_path, *pair, *alone, "--expert-budget", "2")
    assert {row["measured"] for row in rows} == {"answers"}  # with answers alone no text is followed
    assert [(row["right"], row["lost"], row["gained"]) for row in rows] == [(3, 0, 0), (3, 0, 0), (2, 2, 1)]
    assert rows[2]["questions"] == 5 and rows[2]["accuracy"] == 0.4 and rows[2]["mcnemar_p"] == 1.0
    low, high = rows[2]["accuracy_95"]
    assert 0.11 < low < 0.12 and 0.76 < high < 0.78  # Wilson's for 2 of 5
    rows = evaluate(tmp_path, *pair, *alone, "--expert-budget", "2", "--count", "2", output="two")
    assert [row["questions"] for row in rows] == [2] * 3


@pytest.mark.slow
def test_a_profile_says_tree_and_budget(pair: list[str], given: list[str], tmp_path: Path) -> None:
    write_profile(tmp_path / "p.json", TreeConfig(2, 2, 6), BudgetConfig(2, score="probability", credit="all"), {})
    command = [*pair, *given[6:], "--profile", str(tmp_path / "p.json")]
    rows = evaluate(tmp_path, *command)
    assert list(dict.fromkeys(row["way"] for row in rows)) == ["6/2/2", "6/2/2, B = 2", "plain"]
    evaluate(tmp_path, *command, *TREE, output="both", expected=2)


def test_without_a_head_questions_are_answered_plainly(pair: list[str], given: list[str], tmp_path: Path) -> None:
    rows = evaluate(tmp_path, *pair[:2], "--draft-model", "none", *given[6:])
    assert [(row["measured"], row["way"]) for row in rows] == [("answers", "plain")]
    (tmp_path / "out" / "evaluate.png").unlink()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--expert-budget", "1"], "expected an expert budget from 2 to 8"),
        (["--expert-budget", "x"], "expected --expert-budget as a number"),
        (["--run-code"], "expected --answers with it"),
        (["--no-thinking"], "expected --chat with it"),
        (["--batch", "0"], "--batch of at least 1"),
        (["--count", "0"], "--count"),
        (["--texts", "x"], "--texts as NAME=FILE"),
        (["--texts", "x=/nowhere/at/all"], "/nowhere/at/all"),
        (["--answers", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--draft-model", "none"], "expected a draft head"),
        (["--draft-model", "none", "--expert-budget", "4"], "plain decoding"),
        (["--tree-size", "1"], "size at least 2"),
    ],
)
def test_what_is_refused(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    evaluate(tmp_path, *pair, *argv, expected=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_tiny(tmp_path / "target", tokenizer=False)
    (tmp_path / "q.jsonl").write_text(json.dumps({"turns": ["1"], "reference": ["1"]}) + "\n")
    flags = ["--model", str(target), "--answers", str(tmp_path / "q.jsonl"), "--compilation-cache", "none"]
    evaluate(tmp_path, *flags, expected=2)
    assert "no tokenizer" in capsys.readouterr().err


def test_intervals_are_written_without_negative_zeros() -> None:
    row = {"x": -1e-9, "x_95": [-1e-9, 0.25], "y": -0.5, "y_95": [-1.0, 0.0]}
    assert (
        within(row, "x", "{:.3f}") == "0.000 (0.000 to 0.250)" and within(row, "x", "{:.1%}") == "0.0% (0.0% to 25.0%)"
    )
    assert within(row, "y", "{:.2f}") == "-0.50 (-1.00 to 0.00)"
