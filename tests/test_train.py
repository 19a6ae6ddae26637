"""Training runs: one that was killed and continued ends with the same bits; the loss falls; the exported head is the
trained one; and the command line around them."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from driver import fast_jit
from full_disk import full_disk
from tiny import write_tiny

import moespec_jax.train.__main__ as command
from moespec_jax.checkpoint.head.read import load_draft
from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.config import DraftConfig
from moespec_jax.errors import RequestError
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train import run, trainer
from moespec_jax.train.optimizer import OptimizerConfig, build_optimizer
from moespec_jax.train.records import Sample
from moespec_jax.train.rows import Rows
from moespec_jax.train.run import Pace, last_state, train
from moespec_jax.train.trainer import Recipe

DENSE = Backend("dense", "flat", False, dense_experts)
STEPS, ROWS, LENGTH = 6, 7, 12
PACE = Pace(save_every=2, evaluate_every=3)
SOURCE = {"data": [{"name": "a.jsonl", "sha256": "00"}]}
HEAD = ["--boundaries", "0,1,2", "--intermediate-size", "24", "--draft-vocab-size", "100", "--format", "speculators"]
SHORT = ["--batch", "2", "--length", "12", "--unroll", "2", "--warmup-steps", "2", "--save-every", "2"]


def lenient(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax counts on promotions that nothing of ours may use."""
    optimizer = build_optimizer(config)

    def update(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(*arguments)

    return optax.GradientTransformation(optimizer.init, update)


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly() -> Any:
    """One program for every run of one recipe, as in production, but compiled in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        step = fast_jit(trainer.train_step.__wrapped__, static_argnums=(0, 1, 2), donate_argnums=(5,))
        patch.setattr(run, "train_step", step)
        patch.setattr(trainer, "build_optimizer", lenient)
        patch.setattr(run, "evaluate_batch", fast_jit(trainer.evaluate_batch.__wrapped__, static_argnums=(0, 1)))
        patch.setattr(command, "load", functools.partial(load, backend=DENSE))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(str(write_tiny(tmp_path_factory.mktemp("target"))), backend=DENSE)


def recipe_of(model: Model, optimizer: OptimizerConfig, **changes: Any) -> Recipe:
    vocab, d = model.config.vocab_size, model.config.hidden_size
    draft = DraftConfig(
        vocab, 100, d, d, 24, num_attention_heads=2, num_key_value_heads=1, head_dim=8, boundaries=(0, 1, 2)
    )
    fields = dict(batch=2, length=LENGTH, unroll=2, recompute=False) | changes
    return Recipe(model.config, draft, optimizer, **fields)


def samples(count: int = ROWS, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(0, 320, LENGTH + 1).astype(np.int32), np.ones(LENGTH + 1, bool)) for _ in range(count)]


def go(model: Model, recipe: Recipe, directory: Path, source: Any = SOURCE, pace: Pace = PACE) -> DraftHead:
    return train(model, recipe, samples, lambda: samples(3, seed=1), directory, pace, source)


def log_of(directory: Path) -> list[dict[str, Any]]:
    """Without the seconds, which nobody can repeat."""
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


class Killed(BaseException):
    """What nothing catches."""


OPTIMIZERS = {
    "adamw": OptimizerConfig(STEPS, learning_rate=1e-2, warmup_steps=2),
    "muon": OptimizerConfig(STEPS, "muon", learning_rate=1e-2, warmup_steps=2, schedule="cosine", decay_from=0.5),
}


@pytest.mark.slow_except("adamw")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed in the middle of writing the log of step 3, of which steps 0 and 1 are saved."""
    recipe = recipe_of(model, OPTIMIZERS[name])
    whole = go(model, recipe, tmp_path / "whole")

    def write(log: Any, row: dict[str, Any]) -> None:
        original(log, row)
        if row["step"] == 3:
            path = tmp_path / "cut" / "log.jsonl"
            path.write_bytes(path.read_bytes()[:-20])
            raise Killed

    original = run._Log.write
    monkeypatch.setattr(run._Log, "write", write)
    with pytest.raises(Killed):
        go(model, recipe, tmp_path / "cut")
    monkeypatch.setattr(run._Log, "write", original)
    incomplete = tmp_path / "cut" / "checkpoints" / "3.orbax-checkpoint-tmp" / "default"
    incomplete.mkdir(parents=True)
    assert last_state(tmp_path / "cut", recipe, model, whole.target_ids)[1] == 2
    assert incomplete.exists(), "reading a run removes nothing, and leaves no thread that does"
    (tmp_path / "cut" / "log.jsonl.incomplete").write_text("of another kill")
    again = go(model, recipe, tmp_path / "cut")
    assert same_bits(again, whole) and log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert not incomplete.parent.exists()
    states = [last_state(tmp_path / x, recipe, model, whole.target_ids) for x in ("cut", "whole")]
    assert states[0][1] == states[1][1] == STEPS and same_bits(states[0][0], states[1][0])
    assert same_bits(states[1][0].head, dataclasses.replace(whole, target_ids=None))
    assert [row["step"] for row in log_of(tmp_path / "cut")] == list(range(STEPS))
    assert [row["step"] for row in log_of(tmp_path / "cut") if "held_out_accuracy" in row] == [2, 5]
    # A finished run is not gone on with.
    assert same_bits(go(model, recipe, tmp_path / "cut"), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what orbax was writing besides
def test_a_full_disk_is_one_error_and_the_run_goes_on(model: Model, tmp_path: Path) -> None:
    """Full amid an asynchronous save: data and log still fit, a checkpoint does not."""
    recipe = recipe_of(model, OPTIMIZERS["adamw"])
    whole = go(model, recipe, tmp_path / "whole")
    with full_disk(20_000), pytest.raises(OSError, match=os.strerror(27)) as raised:
        go(model, recipe, tmp_path / "cut")
    assert raised.value.filename == str(tmp_path / "cut" / "checkpoints")
    assert last_state(tmp_path / "cut", recipe, model, whole.target_ids)[1] == 0
    assert same_bits(go(model, recipe, tmp_path / "cut"), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_every_parameter_moves_and_the_target_does_not(model: Model, tmp_path: Path) -> None:
    before = jax.tree.map(np.array, model.params)
    recipe = recipe_of(model, OPTIMIZERS["adamw"])
    head = go(model, recipe, tmp_path)
    first = random_head(recipe.draft, model.params, head.target_ids, jax.random.key(0))
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(head), jax.tree.leaves(first), strict=True):
        assert (np.asarray(new) != np.asarray(old)).any() == (path[0].name != "target_ids"), path
    assert same_bits(before, model.params)


def test_another_run_is_not_continued(model: Model, tmp_path: Path) -> None:
    recipe = recipe_of(model, OPTIMIZERS["adamw"])
    go(model, recipe, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    others: list[tuple[Any, ...]] = [
        (dataclasses.replace(recipe, seed=1), SOURCE, r"recipe\.seed differ"),
        (recipe_of(model, OPTIMIZERS["muon"]), SOURCE, r"recipe\.optimizer\.name, .*decay_from differ"),
        (recipe, {"data": [{"name": "a.jsonl", "sha256": "01"}]}, r"source\.data differ"),
    ]
    for other, source, message in others:
        with pytest.raises(RequestError, match=message):
            go(model, other, tmp_path, source)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_mended_data_begin_anew(model: Model, tmp_path: Path) -> None:
    """Nothing is claimed for data that could not be read; and what a kill left of their rows is not used."""

    def bad() -> list[Sample]:
        raise RequestError("line 5")

    recipe = recipe_of(model, OPTIMIZERS["adamw"])
    with pytest.raises(RequestError, match="line 5"):
        train(model, recipe, bad, None, tmp_path, PACE, {"data": 1})
    np.savez(tmp_path / "rows.npz", ids=np.zeros((4, 3)))
    for empty in ([], [s._replace(counts=~s.counts) for s in samples()]):
        with pytest.raises(RequestError, match="tokens to be predicted"):
            train(model, recipe, lambda empty=empty: empty, None, tmp_path, PACE, {"data": 2})
    go(model, recipe, tmp_path / "fresh")
    go(model, recipe, tmp_path)
    assert log_of(tmp_path) == log_of(tmp_path / "fresh")


@pytest.mark.slow
def test_the_loss_falls(model: Model, tmp_path: Path) -> None:
    """Four rows again and again: the head, which knows all tokens, learns them by heart."""
    optimizer = OptimizerConfig(80, learning_rate=1e-2, warmup_steps=5, clip=10.0)
    recipe = recipe_of(model, optimizer, batch=4)
    recipe = dataclasses.replace(recipe, draft=dataclasses.replace(recipe.draft, draft_vocab_size=320))
    head = train(model, recipe, lambda: samples(4), lambda: samples(4), tmp_path, Pace(1000, 1000), SOURCE)
    rows = log_of(tmp_path)
    for step in range(recipe.unroll):
        assert np.mean([row["loss"][step] for row in rows[-5:]]) < 0.6 * rows[0]["loss"][step]
    assert min(rows[-1]["held_out_accuracy"]) > 0.5 > 0.1 > max(rows[0]["accuracy"])
    run.draw_training(tmp_path / "log.jsonl", tmp_path / "picture.png", 48)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    # Rows fewer than a batch score as the same rows twice, and those after the last whole batch are left out.
    state, some = last_state(tmp_path, recipe, model, head.target_ids)[0], samples(1) + samples(1, seed=9)
    score: Callable[[list[Sample]], list[float]] = lambda some: run.held_out_accuracy(  # noqa: E731
        recipe, model, head.target_ids, state, Rows(*(np.stack(part) for part in zip(*some, strict=True)))
    )
    assert 0.2 < score(some)[0] < 0.9 and score(some) == score(some * 2) == score(some * 2 + samples(3, seed=5))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    lines = [{"text": f"def add{i}(a, b):\n    return a + {i}\n"} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def call(model: Model, data: Path, output: Path, *more: str) -> int:
    files = ["--model", str(model.directory), "--data", str(data), "--output", str(output)]
    return command.main([*files, "--steps", "4", *SHORT, *more])


def test_command_line(model: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, head = tmp_path / "run", ["--boundaries", "1,2,3", "--intermediate-size", "24", "--draft-vocab-size", "100"]
    deep = dataclasses.replace(model, directory=write_tiny(tmp_path / "deep", num_hidden_layers=3))
    assert call(deep, data, output, *head, "--learning-rate", "1e-2", "--held-out", str(data)) == 0
    assert capsys.readouterr().out == f"wrote {output / 'head'}\n"
    assert (output / "training.png").exists() and len(log_of(output)) == 4
    # Where it was made is nobody's business, and would keep a moved run from being continued.
    told = (output / "run.json").read_text()
    assert str(tmp_path) not in told and '"data.jsonl"' in told
    target = load(str(deep.directory), backend=DENSE)
    loaded = load_draft(output / "head", target.config, None)
    recipe = command.recipe_of(
        command._parser().parse_args(
            ["--model", "m", "--data", "d", "--output", "o", "--steps", "4", *SHORT, *head, "--learning-rate", "1e-2"]
        ),
        target,
    )
    assert loaded.format == "specforge" and loaded.config == recipe.draft
    assert (loaded.config.num_attention_heads, loaded.config.rope.rope_theta) == (4, 10_000.0)
    state, step = last_state(output, recipe, target, loaded.head.target_ids)
    assert step == 4 and same_bits(state.head, dataclasses.replace(loaded.head, target_ids=None))
    log = (output / "log.jsonl").read_bytes()
    assert call(deep, data, output, *head, "--learning-rate", "1e-2", "--held-out", str(data)) == 0
    assert (output / "log.jsonl").read_bytes() == log
    # The same lines, of which one is longer: the run is another.
    data.write_text(data.read_text() + '{"text": "more"}\n')
    capsys.readouterr()
    assert call(deep, data, output, *head, "--learning-rate", "1e-2", "--held-out", str(data)) == 2
    assert "source.data, source.held_out differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "cannot: boundary 0 (the embedding): choose the format speculators (--format)"),
        (["--norm-output"], "cannot: norm_output, boundary 0 (the embedding): choose the format speculators"),
        (["--boundaries", "0,2,2"], "strictly increasing boundaries from 0 to 2; got 0, 2, 2"),
        (["--boundaries", "0,1,3"], "boundaries from 0 to 2"),
        (["--boundaries", "1,2"], "expected three"),
        (["--boundaries", "a"], "--boundaries as numbers like 2,24,45"),
        ([*HEAD, "--format", "specforge"], "specforge format can express; it cannot: boundary 0"),
        ([*HEAD, "--fc-norm", "--norm-before-fc"], "expected one of --fc-norm and --norm-before-fc"),
        ([*HEAD, "--draft-vocab-size", "321"], "at most 320 tokens; got 321"),
        ([*HEAD, "--length", "97"], "context of 96; got 97"),
        ([*HEAD, "--length", "2"], "--length above the 2 of --unroll"),
        ([*HEAD, "--batch", "0"], "--batch: invalid count value"),
        ([*HEAD, "--data", "none.jsonl"], "none.jsonl; No such file"),
        ([*HEAD, "--output", "/dev/null/run"], "expected a directory to train in"),
    ],
)
def test_errors_are_one_line(
    model: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """And come before anything is trained or written."""
    assert call(model, data, tmp_path / "run", *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_a_head_of_every_variant_has_its_settings(model: Model) -> None:
    flags = ["--fc-norm", "--norm-output", "--norm-before-residual", "--qk-norm", "--layers", "2"]
    parsed = command._parser().parse_args(["--model", "m", "--data", "d", "--output", "o", *HEAD, *flags])
    draft = command.draft_config(parsed, model.config)
    assert draft.fc_norm and draft.norm_output and draft.norm_before_residual and not draft.norm_before_fc
    assert (draft.qk_norm, draft.num_hidden_layers, draft.boundaries) == ("head", 2, (0, 1, 2))
    deep = dataclasses.replace(model.config, num_hidden_layers=48, intermediate_size=16)
    parsed = command._parser().parse_args(["--model", "m", "--data", "d", "--output", "o"])
    draft = command.draft_config(parsed, deep)
    assert draft.boundaries == (2, 24, 45) and draft.intermediate_size == 3 * 32 and draft.draft_vocab_size == 320
