"""A training run goes on with more steps: from its last checkpoint, by the schedule of the larger number."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import test_train
from test_train import OPTIMIZERS, Killed, go, log_of, recipe_of, same_bits

from moespec_jax.errors import RequestError
from moespec_jax.runtime.model import Model
from moespec_jax.train import run, trainer
from moespec_jax.train.optimizer import OptimizerConfig, _schedule
from moespec_jax.train.rows import draft_vocabulary
from moespec_jax.train.run import last_state
from moespec_jax.train.settings import settings_to_keep

model, compile_quickly = test_train.model, test_train._compile_quickly
SHORT = OptimizerConfig(4, learning_rate=1e-2, warmup_steps=2)
LONG = OPTIMIZERS["adamw"]


def test_the_schedules_differ() -> None:
    """The rate, which would be 0 after the shorter run, is again that of the longer one at the same step."""
    assert LONG == dataclasses.replace(SHORT, steps=6)
    rates = [[float(_schedule(optimizer, 1.0)(step)) for step in (2, 3, 4, 5)] for optimizer in (SHORT, LONG)]
    np.testing.assert_allclose(rates, [[1, 0.5, 0, 0], [1, 0.75, 0.5, 0.25]])


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [4, 2], ids=["finished", "killed"])
def test_more_steps_continue_a_run(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int) -> None:
    """From the state of the last checkpoint, with steps of the longer recipe; then as any other run."""
    short, long = recipe_of(model, SHORT), recipe_of(model, LONG)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", kill_after(stopped, run._save))
        with pytest.raises(Killed):
            go(model, short, tmp_path)
    rows, mesh = run._read_rows(tmp_path)[0], trainer.data_mesh(short.batch)
    ids = jax.numpy.asarray(draft_vocabulary(rows, short.target.vocab_size, short.draft.draft_vocab_size))
    state, first = last_state(tmp_path, short, model, ids)
    assert first == stopped
    for step in range(first, 6):
        batch = trainer.shard_batch(mesh, rows.batch(step, short.batch, short.seed))
        state, _ = run.train_step(long, model.backend, mesh, model.params, ids, state, batch)
    head = dataclasses.replace(state.head, target_ids=ids)
    assert same_bits(go(model, long, tmp_path), head)
    assert [row["step"] for row in log_of(tmp_path)] == list(range(6))
    assert json.loads((tmp_path / "run.json").read_text())["extended"] == [{"steps": 4, "at": stopped}]
    # The same command again; a shorter one.
    assert same_bits(go(model, long, tmp_path), head)
    with pytest.raises(RequestError, match=r"recipe\.optimizer\.steps differ: .* larger --steps"):
        go(model, short, tmp_path)


def kill_after(step: int, save: Callable[..., None]) -> Callable[..., None]:
    """A save that kills the run after the checkpoint of `step`."""

    def killing(manager: Any, at: int, state: Any) -> None:
        save(manager, at, state)
        if at == step:
            manager.wait_until_finished()
            raise Killed

    return killing


def settings(steps: int) -> dict[str, Any]:
    return {"recipe": {"seed": 1, "optimizer": {"steps": steps, "name": "adamw"}}, "source": {"data": []}}


def test_every_extension_is_recorded(tmp_path: Path) -> None:
    """None before the first checkpoint: all steps of that run are those of the larger number."""
    directory, file = tmp_path / "run", tmp_path / "run" / "run.json"
    found = []
    for steps, saved in ((10, None), (20, None), (20, "10"), (30, "20"), (30, "25.orbax-checkpoint-tmp"), (50, "30")):
        if saved is not None:
            (directory / "checkpoints" / saved).mkdir(parents=True)
        kept, continued = settings_to_keep(directory, settings(steps))
        assert continued == bool(found)
        file.write_text(json.dumps(kept))
        found.append([(e["steps"], e["at"]) for e in kept.pop("extended", [])])
        assert kept == settings(steps)
    assert found == [[], [], [], [(20, 20)], [(20, 20)], [(20, 20), (30, 30)]]
    before = file.read_bytes()
    other = settings(60)
    other["recipe"]["seed"] = 2
    for wrong, name in ((settings(49), "recipe.optimizer.steps"), (other, "recipe.seed")):
        with pytest.raises(RequestError, match=f"; {name} differ"):
            settings_to_keep(directory, wrong)
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ['{"recipe": {}}', '{"recipe": {"optimizer": {"steps": "x"}}}', "{}"])
def test_a_damaged_record_is_another_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RequestError, match="recipe.* differ"):
        settings_to_keep(tmp_path, settings(10))
