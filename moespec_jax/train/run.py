"""A training run on disk: what it was asked, its data, checkpoints, log and picture; continued where it was cut off.

    run.json  rows.npz  checkpoints/  log.jsonl  training.png  head/

Batches are a function of the step and a checkpoint holds the whole state, so a run that was killed and continued ends
with the same bits as one that was not.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moespec_jax.draft import DraftHead
from moespec_jax.files import write_json
from moespec_jax.model import Model, RequestError
from moespec_jax.train.records import Sample
from moespec_jax.train.rows import Rows, draft_vocabulary, pack
from moespec_jax.train.trainer import (
    Recipe,
    TrainState,
    data_mesh,
    evaluate_batch,
    finished_head,
    initial_state,
    random_head,
    shard_batch,
    train_step,
)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How often, in steps, a run saves and looks at held-out rows."""

    save_every: int = 50
    evaluate_every: int = 100


def train(
    model: Model, recipe: Recipe, data: Callable[[], Iterable[Sample]], held_out: Callable[[], Iterable[Sample]],
    directory: Path, pace: Pace, source: dict[str, Any],
) -> DraftHead:  # fmt: skip
    """Run or continue a recipe in `directory`; returns the trained head. `source` says where the data came from.

    Raises:
        RequestError: `directory` holds another run, or there is too little data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _claim(directory, {"recipe": dataclasses.asdict(recipe), "source": source})
    rows, checks = _prepare(directory, recipe, data, held_out)
    ids = draft_vocabulary(rows, recipe.target.vocab_size, recipe.draft.draft_vocab_size)
    target_ids, mesh = jnp.asarray(ids), data_mesh(recipe.batch)
    # Made by a function so that a restored state takes its place: nothing else keeps the first one.
    head = random_head(recipe.draft, model.params, target_ids, jax.random.key(recipe.seed))
    state, first, manager = _restore(directory, initial_state(recipe, head, mesh))
    log = _Log(directory / "log.jsonl", first)
    compute = model.backend.compute(model.config.hidden_act)
    with tqdm(total=recipe.optimizer.steps, initial=first, unit="step") as bar:
        for step in range(first, recipe.optimizer.steps):
            started = time.perf_counter()
            batch = shard_batch(mesh, rows.batch(step, recipe.batch, recipe.seed))
            state, metrics = train_step(recipe, compute, mesh, model.params, target_ids, state, batch)
            row = {"step": step, **{name: np.asarray(value).tolist() for name, value in metrics._asdict().items()}}
            row["seconds"] = time.perf_counter() - started
            last = step + 1 == recipe.optimizer.steps
            if len(checks.ids) and ((step + 1) % pace.evaluate_every == 0 or last):
                row["held_out_accuracy"] = held_out_accuracy(recipe, model, target_ids, state, checks)
            log.write(row)
            bar.set_postfix(loss=f"{row['loss'][0]:.3f}", accuracy="/".join(f"{x:.2f}" for x in row["accuracy"]))
            bar.update()
            if (step + 1) % pace.save_every == 0 or last:
                _save(manager, step + 1, state)
    manager.wait_until_finished()
    return finished_head(state, target_ids)


def held_out_accuracy(recipe: Recipe, model: Model, target_ids: Any, state: TrainState, rows: Rows) -> list[float]:
    """Share of the target's first choices guessed at each draft step, over all rows."""
    compute = model.backend.compute(model.config.hidden_act)
    hits, positions = np.zeros(recipe.unroll), np.zeros(recipe.unroll)
    for start in range(0, len(rows.ids) - recipe.batch + 1, recipe.batch):
        batch = Rows(*(part[start : start + recipe.batch] for part in rows))
        scores = evaluate_batch(recipe, compute, model.params, target_ids, state, batch)
        hits += [float(score.hits) for score in scores]
        positions += [float(score.positions) for score in scores]
    return (hits / np.maximum(positions, 1)).round(5).tolist()


def _claim(directory: Path, run: dict[str, Any]) -> None:
    """Write down what this run is, or find that it is the same one."""
    file, run = directory / "run.json", json.loads(json.dumps(run))
    if not file.exists():
        write_json(file, run)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if before != run:
        differ = _differences(before, run)
        raise RequestError(
            f"expected the settings that the run in {directory} began with; {', '.join(differ)} differ:"
            " continue with the same command, or train elsewhere"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = []
    for name in names:
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _prepare(
    directory: Path, recipe: Recipe, data: Callable[[], Iterable[Sample]], held_out: Callable[[], Iterable[Sample]]
) -> tuple[Rows, Rows]:
    """Rows to train on and rows to check with, packed once and kept."""
    file = directory / "rows.npz"
    if not file.exists():
        # One token more than the target reads: the last one is only predicted.
        train, check = pack(data(), recipe.length + 1), pack(held_out(), recipe.length + 1)
        temporary = directory / "rows.incomplete.npz"
        np.savez(temporary, ids=train.ids, counts=train.counts, check_ids=check.ids, check_counts=check.counts)
        temporary.replace(file)
    with np.load(file) as kept:
        train, check = Rows(kept["ids"], kept["counts"]), Rows(kept["check_ids"], kept["check_counts"])
    if not train.counts.any():
        raise RequestError(f"expected data with tokens to be predicted; {len(train.ids)} rows hold none")
    return train, check


def _restore(directory: Path, state: TrainState) -> tuple[TrainState, int, Any]:
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(
        (directory / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    latest = manager.latest_step()
    if latest is None:
        return state, 0, manager
    restored: Any = manager.restore(latest, args=ocp.args.StandardRestore(state))
    return restored, latest, manager


def _save(manager: Any, step: int, state: TrainState) -> None:
    import orbax.checkpoint as ocp

    manager.save(step, args=ocp.args.StandardSave(state))


class _Log:
    """JSON lines, one a step; what an interrupted run wrote after its last checkpoint is dropped."""

    def __init__(self, path: Path, first: int):
        rows = path.read_text(encoding="utf-8").splitlines()[:first] if path.exists() else []
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        self._path = path

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def draw_training(log: Path, picture: Path, tokens_per_step: int, mesh: Mesh | None = None) -> None:
    """Loss of the first step and accuracy of every step against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seen = [(row["step"] + 1) * tokens_per_step / 1e6 for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot(seen, [row["loss"][0] for row in rows], linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss of the first draft step")
    checks = [(x, row["held_out_accuracy"]) for x, row in zip(seen, rows, strict=True) if "held_out_accuracy" in row]
    for step in range(len(rows[-1]["accuracy"])):
        if checks:
            right.plot([x for x, _ in checks], [a[step] for _, a in checks], "o-", label=f"step {step}")
    right.set(xlabel="million tokens", ylabel="held-out accuracy", ylim=(0, 1))
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
