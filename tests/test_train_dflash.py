"""Training of DFlash and DSpark heads, with the trainer of EAGLE-3 heads: the loss falls, a run goes on with the same
bits, and the head that is written is the trained one."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import (
    DENSE,
    PACE,
    SHORT,
    SOURCE,
    _compile_quickly,  # noqa: F401
    call,
    data,  # noqa: F401
    log_of,
    model,  # noqa: F401
    same_bits,
    samples,
)

import moespec_jax.train.__main__ as command
from moespec_jax.checkpoint.head.dflash_table import random_block_head
from moespec_jax.checkpoint.head.read import LoadedBlockDraft, load_any_draft
from moespec_jax.config import TreeConfig
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train.block_config import block_config
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.run import Pace, last_state, train
from moespec_jax.train.trainer import BlockRecipe, SparkRecipe

HEADS = {"dflash": [], "dspark": ["--markov-rank", "8"]}
FLAGS = ["--head", "dflash", "--block-size", "4", "--anchors", "6", "--layers", "2", "--intermediate-size", "24"]


def flags_of(head: str) -> list[str]:
    return [*FLAGS, "--head", head, *HEADS[head]]


def recipe_of(model: Model, optimizer: OptimizerConfig, head: str = "dflash") -> BlockRecipe:  # noqa: F811
    flags = command._parser().parse_args(["--model", "m", "--data", "d", "--output", "o", *flags_of(head)])
    draft, kind = block_config(flags, model.config), SparkRecipe if head == "dspark" else BlockRecipe
    return kind(model.config, draft, optimizer, batch=2, length=12, unroll=draft.drafted, anchors=6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_falls_and_the_output_matrix_stays(model: Model, tmp_path: Path, kind: str) -> None:  # noqa: F811
    """Two rows again and again: the head learns what the target draws after them."""
    recipe = recipe_of(model, OptimizerConfig(80, learning_rate=5e-3, warmup_steps=5, clip=10.0), kind)
    head = train(model, recipe, lambda: samples(2), lambda: samples(2), tmp_path, Pace(1000, 1000), SOURCE)
    rows = log_of(tmp_path)
    for step in range(recipe.unroll):
        assert np.mean([row["loss"][step] for row in rows[-5:]]) < 0.8 * rows[0]["loss"][step]
    assert isinstance(head, DFlashHead) and head.target_ids is not None and model.params.lm_head is not None
    assert same_bits(head.lm_head, model.params.lm_head[head.target_ids])
    assert ("confidence_loss" in rows[0]) == (kind == "dspark") and (head.markov is not None) == (kind == "dspark")
    if kind == "dspark":
        assert all(np.isfinite(row["confidence_loss"]).all() for row in rows)
        start = random_block_head(recipe.draft, model.params, head.target_ids, jax.random.key(recipe.seed))  # pyright: ignore
        for part in ("markov", "confidence"):
            moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), getattr(head, part), getattr(start, part))
            assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_an_estimate_without_weight_is_not_trained(model: Model, tmp_path: Path) -> None:  # noqa: F811
    """And with one it is, to the calibrated share."""
    recipe = recipe_of(model, OptimizerConfig(60, learning_rate=5e-3, warmup_steps=5, clip=10.0), "dspark")
    assert isinstance(recipe, SparkRecipe)
    silent = dataclasses.replace(recipe, confidence_weight=0.0)
    losses = []
    for number, one in enumerate((recipe, silent)):
        place = tmp_path / str(number)
        head = train(model, one, lambda: samples(2), None, place, Pace(1000, 1000), SOURCE)
        assert isinstance(head, DFlashHead) and head.confidence is not None and recipe.draft.drafted == 4  # pyright: ignore
        losses.append(np.mean([row["confidence_loss"] for row in log_of(place)[-5:]]))
        assert np.any(head.confidence.bias) == (number == 0)
    assert losses[0] < losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_a_run_that_goes_on_ends_with_the_same_bits(model: Model, tmp_path: Path, kind: str) -> None:  # noqa: F811
    """A run that loses its last checkpoint trains those steps again."""
    recipe = recipe_of(model, OptimizerConfig(6, learning_rate=1e-3, warmup_steps=2), kind)
    whole = train(model, recipe, samples, None, tmp_path, PACE, SOURCE)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert same_bits(train(model, recipe, samples, None, tmp_path, PACE, SOURCE), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_command_line(
    model: Model,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    output = tmp_path / "run"
    assert call(model, data, output, *flags_of(kind), "--learning-rate", "1e-2") == 0
    assert capsys.readouterr().out == f"wrote {output / 'head'}\n" and len(log_of(output)) == 4
    loaded = load_any_draft(output / "head", model.config, None)
    recipe = recipe_of(model, OptimizerConfig(4), kind)
    assert (
        isinstance(loaded, LoadedBlockDraft)
        and loaded.config == recipe.draft
        and loaded.head.lm_head is None
        and loaded.format == "speculators"
    )
    drafts = load(str(model.directory), output / "head", backend=DENSE)
    assert isinstance(drafts.draft, LoadedBlockDraft) and drafts.draft.head.lm_head is drafts.params.lm_head
    assert loaded.config.whole_block == (TreeConfig(2, 1, 4) if kind == "dflash" else TreeConfig(3, 1, 5))
    if kind == "dspark":
        assert loaded.head.target_ids is not None
        names = ["--model", "m", "--data", "d", "--output", "o", "--steps", "4", *SHORT]
        recipe = command.recipe_of(
            command._parser().parse_args([*names, *flags_of(kind), "--learning-rate", "1e-2"]), model
        )
        trained = last_state(output, recipe, model, loaded.head.target_ids)[0].head
        assert same_bits(dataclasses.replace(trained, lm_head=None), dataclasses.replace(loaded.head, target_ids=None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "1"], "expected --block-size of at least 2"),
        (["--mask-token-id", "320"], "--mask-token-id from 0 to 319; got 4 and 320"),
        (["--boundaries", "2,1"], "strictly increasing boundaries from 0 to 2; got 2, 1"),
        (["--fc-norm"], "expected flags of a DFlash head; --fc-norm are an EAGLE-3 head's"),
        (["--draft-vocab-size", "321"], "at most 320 tokens; got 321"),
        (["--length", "3"], "--length above the 3 of a block"),
        (["--markov-rank", "4"], "expected --head dspark with --markov-rank; got --head dflash"),
        (["--head", "eagle3", "--markov", "rnn"], "expected --head dspark with --markov; got --head eagle3"),
        (
            ["--confidence", "none", "--confidence-weight", "2"],
            "with --confidence, --confidence-weight; got",
        ),
        (["--head", "dspark", "--length", "4"], "--length above the 4 of a block"),
        (["--head", "dspark", "--markov", "none", "--markov-rank", "4"], "with --markov-rank; got --markov none"),
        (["--head", "dspark", "--markov", "none", "--confidence", "hidden+markov"], "got --markov none"),
        (["--head", "dspark", "--confidence", "none", "--confidence-weight", "1"], "got --confidence none"),
        (["--head", "dspark", "--confidence-weight", "-1"], "--confidence-weight of at least 0, got -1.0"),
        (["--head", "dspark", "--markov-rank", "0"], "--markov-rank: invalid count value"),
    ],
)
def test_errors_are_one_line(
    model: Model,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert call(model, data, tmp_path / "run", *FLAGS, *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


PARTS: dict[str, tuple[list[str], tuple[str, int, str]]] = {
    "default": ([], ("vanilla", 256, "hidden and markov")),
    "gated": (["--markov", "gated", "--markov-rank", "5"], ("gated", 5, "hidden and markov")),
    "rnn": (["--markov", "rnn", "--confidence", "hidden"], ("rnn", 256, "hidden")),
    "estimate alone": (["--markov", "none"], ("none", 0, "hidden")),
    "bias alone": (["--confidence", "none"], ("vanilla", 256, "none")),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_dspark_head_has_the_parts_of_its_flags(model: Model, what: str) -> None:  # noqa: F811
    flags, parts = PARTS[what]
    weight = [] if parts[2] == "none" else ["--confidence-weight", "0.5"]
    names = ["--model", "m", "--data", "d", "--output", "o", *FLAGS, "--head", "dspark", "--length", "12"]
    recipe = command.recipe_of(command._parser().parse_args([*names, *flags, *weight]), model)
    draft = recipe.draft
    assert isinstance(recipe, SparkRecipe) and recipe.unroll == 4 and draft.sample_from_anchor  # pyright: ignore
    assert (draft.markov, draft.markov_rank, draft.confidence) == parts  # pyright: ignore
    assert recipe.confidence_weight == (1.0 if parts[2] == "none" else 0.5)
