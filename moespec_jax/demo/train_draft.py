"""Train the embedded draft head: python -m moespec_jax.demo.train_draft --text DIR --output DIR.

The target continues prompts from its training text, two thirds of them greedily and one third at temperature 1. The
head is trained on these continuations and on two thirds as many rows of the text. The same command continues an
interrupted run. Afterwards python -m moespec_jax.demo.finish_draft --training DIR exports the head.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from moespec_jax.cli.command import Parser, run_command
from moespec_jax.config import DraftConfig
from moespec_jax.demo.text import prepare_text
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.records import Sample, read_samples
from moespec_jax.train.regenerate import regenerate
from moespec_jax.train.run import Pace, train
from moespec_jax.train.trainer import Recipe

PROMPT, RESPONSE = 64, 192
LENGTH = PROMPT + RESPONSE
# Name of the file, thirds of the prompts, temperature of the continuations.
RESPONSES = (("greedy", 2, 0.0), ("sampled", 1, 1.0))
HELD_OUT_ROWS = 256
DRAFT = DraftConfig(
    vocab_size=4096,
    draft_vocab_size=2048,
    hidden_size=256,
    target_hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    boundaries=(1, 2, 4),
    max_position_embeddings=1024,
)


def recipe(model: Model, steps: int, batch: int, unroll: int) -> Recipe:
    """Build the recipe of the embedded head: `batch` rows a step, and `unroll` draft steps."""
    optimizer = OptimizerConfig(
        steps, "muon", learning_rate=1e-2, adam_learning_rate=2e-3, warmup_steps=40, decay_from=0.4, clip=1.0
    )
    return Recipe(model.config, DRAFT, optimizer, batch=batch, length=LENGTH, unroll=unroll, recompute=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(prog="python -m moespec_jax.demo.train_draft", description=__doc__)
    parser.add_argument(
        "--text", type=Path, required=True, metavar="DIR", help="directory of the target's run, which holds its text"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the run")
    parser.add_argument("--steps", type=int, default=4000, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=36864, metavar="N", help="prompts that are continued (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="rows of a step (default: %(default)s)")
    parser.add_argument("--unroll", type=int, default=7, metavar="N", help="draft steps (default: %(default)s)")
    return run_command(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    # On a GPU the kernels of decoding do not pay for products of many rows, and have no gradients.
    backend = BACKENDS["dense"] if jax.default_backend() == "gpu" else None
    model, directory = load(draft_model="none", dtype="float32", backend=backend), arguments.output
    directory.mkdir(parents=True, exist_ok=True)
    stream, held_out_stream = prepare_text(arguments.text, model.config.vocab_size)
    random = np.random.default_rng(1)
    third = arguments.prompts // 3
    for name, thirds, temperature in RESPONSES:
        starts = random.integers(0, len(stream) - 100, thirds * third)
        prompts = [stream[start : start + PROMPT].tolist() for start in starts]
        output = directory / f"{name}.jsonl"
        regenerate(model, prompts, output, batch=4 * arguments.batch, max_new_tokens=RESPONSE, temperature=temperature)

    def data() -> Iterator[Sample]:
        for name, _, _ in RESPONSES:
            yield from read_samples(model, directory / f"{name}.jsonl")
        yield from _windows(stream, 2 * third)

    def held_out() -> Iterator[Sample]:
        return _windows(held_out_stream, HELD_OUT_ROWS)

    text = json.loads((arguments.text / "corpus.json").read_text(encoding="utf-8"))
    responses = {name: thirds * third for name, thirds, _ in RESPONSES}
    plan = recipe(model, arguments.steps, arguments.batch, arguments.unroll)
    train(model, plan, data, held_out, directory, Pace(), {"responses": responses, "text_rows": 2 * third, **text})


def _windows(stream: np.ndarray, count: int) -> Iterator[Sample]:
    """Cut evenly spaced samples from a stream; every token counts."""
    for start in np.linspace(0, len(stream) - LENGTH - 1, count).astype(int):
        yield Sample(stream[start : start + LENGTH + 1].astype(np.int32), np.ones(LENGTH + 1, bool))


if __name__ == "__main__":
    sys.exit(main())
