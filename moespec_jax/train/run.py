"""Training run in a directory: settings, data, checkpoints, log and plot. An interrupted run is continued, and a
finished one if there are more steps.

    run.json  rows.npz  checkpoints/  log.jsonl  training.png  head/

Batches are a function of the step, and a checkpoint holds the whole state, so a run that was killed and continued ends
with the same bits as an uninterrupted one.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moespec_jax.checkpoint.head.dflash_table import random_block_head
from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import replacing, write_json, write_text, writing
from moespec_jax.nn.decoder import Decoder
from moespec_jax.parallel.processes import all_or_none, fetch, is_first_process, replicate
from moespec_jax.runtime.model import Model
from moespec_jax.train.records import Sample
from moespec_jax.train.rows import Rows, draft_vocabulary, pack
from moespec_jax.train.settings import settings_to_keep
from moespec_jax.train.trainer import (
    AnyHead,
    Recipe,
    TrainState,
    data_mesh,
    evaluate_batch,
    finished_head,
    initial_state,
    shard_batch,
    train_step,
)

# Directories of checkpoints that orbax has not completed; a complete one is renamed to its step.
_INCOMPLETE = "*.orbax-checkpoint-tmp*"


@dataclasses.dataclass(frozen=True)
class Pace:
    """Intervals of a run, in steps.

    Fields:
        save_every: steps between checkpoints.
        evaluate_every: steps between measurements on held-out rows.
    """

    save_every: int = 50
    evaluate_every: int = 100


def train(
    model: Model, recipe: Recipe, data: Callable[[], Iterable[Sample]], held_out: Callable[[], Iterable[Sample]] | None,
    directory: Path, pace: Pace, source: dict[str, Any],
) -> AnyHead:  # fmt: skip
    """Run or continue a recipe in `directory`; returns the trained head.

    Args:
        model: target; its draft head is not used.
        recipe: what to train, and how.
        data: makes the samples to train on; called once, before the first step of a new run.
        held_out: makes the samples to measure accuracy on, if there are any.
        directory: of the run, made if there is none.
        pace: when to save and to measure.
        source: identity of model and data as JSON; a run continues only if it is unchanged, and of the recipe nothing
            but a larger number of steps is new.

    Raises:
        RequestError: `directory` holds another run, or no token can be learned, or measured in the held-out data.
    """
    run, mesh = {"recipe": dataclasses.asdict(recipe), "source": source}, data_mesh(recipe.batch)
    with all_or_none():
        if is_first_process():
            run, is_continued = settings_to_keep(directory, run)
            _prepare(directory, recipe, data, held_out, keep=is_continued)
            # After the data have been read, so that a run can start again with corrected data where that fails.
            write_json(directory / "run.json", run)
            _remove_incomplete(directory / "checkpoints")
    rows, checks = _read_rows(directory)
    ids = draft_vocabulary(rows, recipe.target.vocab_size, recipe.draft.draft_vocab_size)
    with _checkpoints(directory) as manager:
        state, first = _begin(manager, recipe, model.params, jnp.asarray(ids), mesh)
        # Before the first step: with several devices, every step would copy them otherwise.
        params, target_ids = replicate(mesh, (model.params, jnp.asarray(ids)))
        model = dataclasses.replace(model, params=params)
        log = _Log(directory / "log.jsonl", first)
        silent = not is_first_process()
        with tqdm(total=recipe.optimizer.steps, initial=first, unit="step", disable=silent) as bar:
            for step in range(first, recipe.optimizer.steps):
                batch = rows.batch(step, recipe.batch, recipe.seed)
                state, row = _advance(recipe, model, mesh, target_ids, state, batch, step)
                last = step + 1 == recipe.optimizer.steps
                if len(checks.ids) and ((step + 1) % pace.evaluate_every == 0 or last):
                    row["held_out_accuracy"] = held_out_accuracy(recipe, model, target_ids, state, checks)
                log.write(row)
                bar.set_postfix(loss=f"{row['loss'][0]:.3f}", accuracy="/".join(f"{x:.2f}" for x in row["accuracy"]))
                bar.update()
                if (step + 1) % pace.save_every == 0 or last:
                    _save(manager, step + 1, state)
    return finished_head(state, target_ids)


def _advance(
    recipe: Recipe, model: Model, mesh: Mesh, target_ids: jax.Array, state: TrainState, batch: Rows, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """Run one step; returns its line of the log too."""
    started = time.perf_counter()
    state, metrics = train_step(recipe, model.backend, mesh, model.params, target_ids, state, shard_batch(mesh, batch))
    measured = {name: value for name, value in metrics._asdict().items() if value is not None}
    row = {"step": step, **{name: np.asarray(value).tolist() for name, value in measured.items()}}
    return state, row | {"seconds": time.perf_counter() - started}


def last_state(directory: Path, recipe: Recipe, model: Model, target_ids: jax.Array) -> tuple[TrainState, int]:
    """Restore the last state that the run in `directory` saved, and its step; the initial state if it saved none."""
    with _checkpoints(directory) as manager:
        return _begin(manager, recipe, model.params, target_ids, data_mesh(recipe.batch))


def held_out_accuracy(recipe: Recipe, model: Model, target_ids: Any, state: TrainState, rows: Rows) -> list[float]:
    """Compute the head's accuracy at each draft step, over all whole batches of rows: the share of counted positions
    where its most probable token is the target's. Fewer rows than one batch are padded with rows that do not count."""
    hits, positions = np.zeros(recipe.unroll), np.zeros(recipe.unroll)
    missing = max(recipe.batch - len(rows.ids), 0)
    rows = Rows(*(np.pad(part, ((0, missing), (0, 0))) for part in rows))
    for start in range(0, len(rows.ids) - recipe.batch + 1, recipe.batch):
        batch = Rows(*(part[start : start + recipe.batch] for part in rows))
        scores = evaluate_batch(recipe, model.backend, model.params, target_ids, state, batch)
        hits += [float(fetch(score.hits)) for score in scores]
        positions += [float(fetch(score.positions)) for score in scores]
    return (hits / np.maximum(positions, 1)).round(5).tolist()


def _prepare(
    directory: Path, recipe: Recipe, data: Callable[[], Iterable[Sample]],
    held_out: Callable[[], Iterable[Sample]] | None, keep: bool,
) -> None:  # fmt: skip
    """Pack the rows to train on and the held-out rows into rows.npz. The file of a continued run (`keep`) is kept.

    Raises:
        RequestError: no token can be learned, or measured in the held-out data.
    """
    file = directory / "rows.npz"
    if not (keep and file.exists()):
        # One token more than the target reads: the last one is a label only.
        train = pack(data(), recipe.length + 1)
        check = pack([] if held_out is None else held_out(), recipe.length + 1)
        if held_out is not None and not _learnable(check):
            raise RequestError("expected held-out data with tokens to be predicted; its rows hold none")
        with replacing(file) as temporary, temporary.open("wb") as out:
            np.savez(out, ids=train.ids, counts=train.counts, check_ids=check.ids, check_counts=check.counts)
    if not _learnable(_read_rows(directory)[0]):
        raise RequestError("expected data with tokens to be predicted; its rows hold none")


def _learnable(rows: Rows) -> bool:
    """Test whether a token counts that the head predicts: the third of a row is the first."""
    return bool(rows.counts[:, 2:].any())


def _read_rows(directory: Path) -> tuple[Rows, Rows]:
    """Read the rows to train on and the held-out rows."""
    with np.load(directory / "rows.npz") as kept:
        train, check = Rows(kept["ids"], kept["counts"]), Rows(kept["check_ids"], kept["check_counts"])
    return train, check


def _remove_incomplete(place: Path) -> None:
    """Remove the checkpoints that an interrupted save left incomplete.

    Orbax would do so in a thread of its own (`cleanup_tmp_directories`), which only the next save waits for: a manager
    that saves nothing leaves it running, and the next manager removes the same directories at the same time and fails.
    """
    for incomplete in place.glob(_INCOMPLETE):
        shutil.rmtree(incomplete)


@contextlib.contextmanager
def _checkpoints(directory: Path) -> Iterator[Any]:
    """Open the run's checkpoints. All saves are complete when the block ends, in error too."""
    import orbax.checkpoint as ocp

    place = (directory / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    # Saving is asynchronous: its errors are raised by the next call of a method of the manager.
    with writing(place), contextlib.closing(ocp.CheckpointManager(place, options=options)) as manager:
        try:
            yield manager
        finally:
            manager.wait_until_finished()


def _begin(manager: Any, recipe: Recipe, target: Decoder, target_ids: jax.Array, mesh: Mesh) -> tuple[TrainState, int]:
    """Restore the last saved state and its step, or build the initial state. A separate function, so that no variable
    of a caller keeps the initial head in memory."""
    import orbax.checkpoint as ocp

    key = jax.random.key(recipe.seed)
    if isinstance(recipe.draft, DFlashConfig):
        head = random_block_head(recipe.draft, target, target_ids, key)
    else:
        head = random_head(recipe.draft, target, target_ids, key)
    state, latest = initial_state(recipe, head, mesh), manager.latest_step()
    if latest is None:
        return state, 0
    place = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    del head, state
    restored: Any = manager.restore(latest, args=ocp.args.StandardRestore(place))
    return restored, latest


def _save(manager: Any, step: int, state: TrainState) -> None:
    import orbax.checkpoint as ocp

    manager.save(step, args=ocp.args.StandardSave(state))


class _Log:
    """Log of the run: JSON lines, one for each step, written by the first process. Opening it removes the lines that an
    interrupted run wrote after its last checkpoint.

    Args:
        path: the file.
        first: the next step.
    """

    def __init__(self, path: Path, first: int):
        self._path = path
        if not is_first_process():
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) < first]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append the line of a step."""
        if not is_first_process():
            return
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    """Step of a line of the log; infinity for an incomplete line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")


def draw_training(log: Path, picture: Path, tokens_per_step: int) -> None:
    """Plot the loss of the first draft step and the accuracy of every draft step by tokens of training; on held-out
    rows if there are any."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seen = [(row["step"] + 1) * tokens_per_step / 1e6 for row in rows]
    figure = Figure(figsize=(10, 3.6), layout="constrained")  # not by pyplot, whose back-end is the user's choice
    left, right = figure.subplots(1, 2)
    left.plot(seen, [row["loss"][0] for row in rows], linewidth=0.8)
    left.set(xlabel="million tokens", ylabel="training loss of the first draft step")
    held_out = any("held_out_accuracy" in row for row in rows)
    name, style = ("held_out_accuracy", "o-") if held_out else ("accuracy", "-")
    checks = [(x, row[name]) for x, row in zip(seen, rows, strict=True) if name in row]
    for step in range(len(checks[0][1]) if checks else 0):
        right.plot([x for x, _ in checks], [a[step] for _, a in checks], style, label=f"step {step}")
    right.set(xlabel="million tokens", ylabel="held-out accuracy" if held_out else "training accuracy", ylim=(0, 1))
    if checks:
        right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
