"""`evaluate --also-load`: the figures are those of whole forward passes of both models, however the texts are cut."""

import dataclasses
import functools
import json
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

from moespec_jax.cli import arguments
from moespec_jax.decoding import autoregressive as decode
from moespec_jax.evaluate.__main__ import main
from moespec_jax.evaluate.texts import PIECE
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model

DENSE = Backend("dense", "flat", False, dense_experts)
LINES = ["def add(a, b): return a + b", "the cat sat on the mat and sat", "naïve café costs 5 € in 日本"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, another checkpoint with its vocabulary, a copy of the first, and one of another vocabulary."""
    root = tmp_path_factory.mktemp("targets")
    seeds = {"first": 0, "other": 1, "copy": 0}
    found = {name: write_tiny(root / name, seed=seed, num_experts=8) for name, seed in seeds.items()}
    return found | {"larger": write_tiny(root / "larger", num_experts=8, vocab_size=400)}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Model]]:
    """The models that the command loads, in order; programs are compiled quickly, and shared by equal loadings."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    models: list[Model] = []

    def quickly(*given: Any, check: Any, **options: Any) -> Model:
        if models:
            assert models[0].params.experts is None and not models[0].params.layers, "two models in memory"
        models.append(dataclasses.replace(load(*given, **options | {"backend": DENSE}), programs=FastPrograms()))
        return models[-1]

    monkeypatch.setattr(arguments, "load", quickly)
    yield models


def evaluate(tmp_path: Path, first: Path, *argv: str, expected: int = 0, output: str = "out") -> list[dict[str, Any]]:
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    given = ["--texts", f"lines={tmp_path / 'lines.txt'}", "--tokens", "20", "--batch", "2"]
    assert main(["--model", str(first), *given, *argv, "--output", str(tmp_path / output)]) == expected
    lines = (tmp_path / output / "evaluate.jsonl").read_text().splitlines() if expected == 0 else []
    return [json.loads(line) for line in lines]


def log_p(model: Model, ids: list[int]) -> np.ndarray:
    logits = cached_logits(model.config, model.params, model.backend, np.array([ids], np.int32))[0]
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1), np.float64)


def expected(first: Model, second: Model) -> dict[str, float]:
    """By one pass of each model over each whole text: means over texts."""
    of_texts = []
    for line in LINES:
        ids = first.encode(line)[: PIECE + 20]
        given = min(PIECE, len(ids) // 2)
        p, q = (log_p(model, ids)[given:-1] for model in (first, second))
        lost = (p - q)[np.arange(len(p)), ids[given + 1 :]]
        kl, same = (np.exp(p) * (p - q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1)
        of_texts.append([kl.mean(), same.mean(), lost.mean()])
    return dict(zip(("kl", "top1", "nats_lost"), np.mean(of_texts, axis=0).tolist(), strict=True))


def test_int8_and_another_checkpoint_against_the_first(
    directories: dict[str, Path],
    loaded: list[Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Texts of several chunks, in two batches."""
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 16)
    first, other = directories["first"], directories["other"]
    argv = ["--also-load", "int8", "--also-load", str(other)]
    rows = evaluate(tmp_path, first, *argv)
    assert [(row["way"], row["exact"]) for row in rows] == [
        ("plain", True), ("plain, int8", False), ("plain, other", False)
    ]  # fmt: skip
    dense = functools.partial(load, backend=DENSE)
    reference = dense(first)
    for row, second in zip(rows, (reference, dense(first, quantization="int8"), dense(other)), strict=True):
        for name, value in expected(reference, second).items():
            low, high = row[f"{name}_95"]
            assert row[name] == pytest.approx(value, abs=2e-5) and low <= row[name] <= high, (row["way"], name)
    assert rows[0]["kl"] == 0 and rows[0]["nats_lost"] == 0
    assert 1e-5 < rows[1]["kl"] < rows[2]["kl"] and rows[1]["dtype"] == "float32, int8 experts"
    assert rows[2]["perplexity"] != rows[0]["perplexity"] and rows[2]["model"] == "other"
    table = capsys.readouterr().out
    assert table.count("LOSSY") == 2 and "the target loaded a second way" in " ".join(table.split())
    assert (tmp_path / "out" / "evaluate.png").stat().st_size > 10_000
    # All measured: the same command reads its results again, and loads the first alone.
    count = len(loaded)
    loaded.clear()
    assert count == 3 and evaluate(tmp_path, first, *argv) == rows and len(loaded) == 1


def test_an_equal_checkpoint_loses_nothing(directories: dict[str, Path], loaded: list[Model], tmp_path: Path) -> None:
    _, row = evaluate(tmp_path, directories["first"], "--also-load", str(directories["copy"]))
    assert (row["kl"], row["top1"], row["nats_lost"], row["exact"]) == (0, 1, 0, False) and len(loaded) == 2


def test_a_quantized_first_way_against_the_whole_checkpoint(
    directories: dict[str, Path], loaded: list[Model], tmp_path: Path
) -> None:
    first = directories["first"]
    rows = evaluate(tmp_path, first, "--quantization", "int8", "--also-load", str(first))
    assert [row["dtype"] for row in rows] == ["float32, int8 experts", "float32"]
    for name, value in expected(load(first, quantization="int8", backend=DENSE), load(first, backend=DENSE)).items():
        assert rows[1][name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--also-load", "float32"], "expected --also-load of another way than the first; both are float32"),
        (["--also-load", "int8", "--quantization", "int8"], "another way than the first; both are int8"),
        (["--also-load", "int8", "--also-load", "int8"], "--also-load of different names; got int8, int8"),
        (["--also-load", "{larger}"], "to have the vocabulary of the first model, 320 tokens; it has 400"),
        (["--also-load", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_is_refused(
    argv: list[str],
    message: str,
    directories: dict[str, Path],
    loaded: list[Model],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [flag.format(**directories) for flag in argv]
    evaluate(tmp_path, directories["first"], *argv, expected=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists() and len(loaded) <= 1, "found before anything is measured"
