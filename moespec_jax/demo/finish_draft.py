"""Export the embedded draft head from a training run: python -m moespec_jax.demo.finish_draft --training DIR.

Writes the run's last checkpoint in SpecForge's format, a record of the training, and a plot. Its acceptance is measured
by python -m benchmarks.acceptance.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.cli.command import Parser, run_command
from moespec_jax.config import DraftConfig
from moespec_jax.demo.train_draft import recipe
from moespec_jax.files import write_json
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.runtime.load import DEMO_DRAFT, load
from moespec_jax.runtime.model import Model
from moespec_jax.train.rows import Rows, draft_vocabulary
from moespec_jax.train.run import draw_training, last_state
from moespec_jax.train.trainer import finished_head


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(prog="python -m moespec_jax.demo.finish_draft", description=__doc__)
    parser.add_argument("--training", type=Path, required=True, metavar="DIR", help="--output of the training run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(DEMO_DRAFT),
        metavar="DIR",
        help="directory of the head (default: %(default)s)",
    )
    return run_command(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    model, training = load(draft_model="none", dtype="float32"), arguments.training
    settings = json.loads((training / "run.json").read_text(encoding="utf-8"))
    step = export_head(model, training, arguments.output)
    log = [json.loads(line) for line in (training / "log.jsonl").read_text(encoding="utf-8").splitlines()][:step]
    tokens = settings["recipe"]["batch"] * settings["recipe"]["length"]
    record = {
        "steps": step,
        "tokens": step * tokens,
        "training_minutes": round(sum(row["seconds"] for row in log) / 60, 1),
        "responses": settings["source"]["responses"],
        "text_rows": settings["source"]["text_rows"],
        "held_out_accuracy_by_step": [row["held_out_accuracy"] for row in log if "held_out_accuracy" in row][-1],
        "training_accuracy_by_step": np.mean([row["accuracy"] for row in log[-50:]], axis=0).round(4).tolist(),
    }
    file = Path(__file__).parent / "draft_record.json"
    write_json(file, record)
    draw_training(training / "log.jsonl", file.with_name("draft_training.png"), tokens)


def export_head(model: Model, training: Path, output: Path) -> int:
    """Write the last checkpoint of a run in SpecForge's format, in bfloat16; returns its step."""
    settings = json.loads((training / "run.json").read_text(encoding="utf-8"))["recipe"]
    plan = recipe(model, settings["optimizer"]["steps"], settings["batch"], settings["unroll"])
    with np.load(training / "rows.npz") as kept:
        rows = Rows(kept["ids"], kept["counts"])
    ids = jnp.asarray(draft_vocabulary(rows, plan.draft.vocab_size, plan.draft.draft_vocab_size))
    state, step = last_state(training, plan, model, ids)
    head = finished_head(state, ids)
    assert isinstance(head, DraftHead) and isinstance(plan.draft, DraftConfig)
    export_draft(head, plan.draft, output, target=model.config, dtype="bfloat16")
    return step


if __name__ == "__main__":
    sys.exit(main())
