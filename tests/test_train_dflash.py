"""Training of DFlash heads, with the trainer of EAGLE-3 heads: the loss falls, a run goes on with the same bits, and
the head that is written is the trained one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_train import DENSE, PACE, SOURCE, _compile_quickly, call, data, log_of, model, same_bits, samples  # noqa: F401

import moespec_jax.train.__main__ as command
from moespec_jax.checkpoint.head.read import LoadedBlockDraft, load_any_draft
from moespec_jax.config import TreeConfig
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train.block_config import block_config
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.run import Pace, train
from moespec_jax.train.trainer import BlockRecipe

FLAGS = ["--head", "dflash", "--block-size", "4", "--anchors", "6", "--layers", "2", "--intermediate-size", "24"]


def recipe_of(model: Model, optimizer: OptimizerConfig) -> BlockRecipe:  # noqa: F811
    flags = command._parser().parse_args(["--model", "m", "--data", "d", "--output", "o", *FLAGS])
    return BlockRecipe(
        model.config, block_config(flags, model.config), optimizer, batch=2, length=12, unroll=3, anchors=6
    )


@pytest.mark.slow
def test_the_loss_falls_and_the_output_matrix_stays(model: Model, tmp_path: Path) -> None:  # noqa: F811
    """Two rows again and again: the head learns what the target draws after them."""
    recipe = recipe_of(model, OptimizerConfig(80, learning_rate=5e-3, warmup_steps=5, clip=10.0))
    head = train(model, recipe, lambda: samples(2), lambda: samples(2), tmp_path, Pace(1000, 1000), SOURCE)
    rows = log_of(tmp_path)
    for step in range(recipe.unroll):
        assert np.mean([row["loss"][step] for row in rows[-5:]]) < 0.8 * rows[0]["loss"][step]
    assert isinstance(head, DFlashHead) and head.target_ids is not None and model.params.lm_head is not None
    assert same_bits(head.lm_head, model.params.lm_head[head.target_ids])


@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_same_bits(model: Model, tmp_path: Path) -> None:  # noqa: F811
    """A run that loses its last checkpoint trains those steps again."""
    recipe = recipe_of(model, OptimizerConfig(6, learning_rate=1e-3, warmup_steps=2))
    whole = train(model, recipe, samples, None, tmp_path, PACE, SOURCE)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert same_bits(train(model, recipe, samples, None, tmp_path, PACE, SOURCE), whole)


@pytest.mark.slow
def test_command_line(
    model: Model,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    assert call(model, data, output, *FLAGS, "--learning-rate", "1e-2") == 0
    assert capsys.readouterr().out == f"wrote {output / 'head'}\n" and len(log_of(output)) == 4
    loaded = load_any_draft(output / "head", model.config, None)
    recipe = recipe_of(model, OptimizerConfig(4))
    assert (
        isinstance(loaded, LoadedBlockDraft)
        and loaded.config == recipe.draft
        and loaded.head.lm_head is None
        and loaded.format == "speculators"
    )
    drafts = load(str(model.directory), output / "head", backend=DENSE)
    assert isinstance(drafts.draft, LoadedBlockDraft) and drafts.draft.head.lm_head is drafts.params.lm_head
    assert loaded.config.whole_block == TreeConfig(2, 1, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "1"], "expected --block-size of at least 2"),
        (["--mask-token-id", "320"], "--mask-token-id from 0 to 319; got 4 and 320"),
        (["--boundaries", "2,1"], "strictly increasing boundaries from 0 to 2; got 2, 1"),
        (["--fc-norm"], "expected flags of a DFlash head; --fc-norm are an EAGLE-3 head's"),
        (["--draft-vocab-size", "321"], "at most 320 tokens; got 321"),
        (["--length", "3"], "--length above the 3 of a block"),
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
