"""Train a draft head: python -m moespec_jax.train --model TARGET --data A.jsonl --output DIR.

The head is an EAGLE-3, DFlash or DSpark head (--head), and the target any model that this library runs. Each line of
the data is a JSON object with text, messages or token ids; the target's own responses, which python -m
moespec_jax.train.regenerate writes, train the best heads. The same command continues an interrupted run, and a larger
--steps a finished one. The head is written to DIR/head, for --draft-model and for SGLang or vLLM (--format).
"""

import argparse
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import optax  # noqa: F401 (the modules below need it)
except ModuleNotFoundError:
    print('error: expected optax, which trains: python -m pip install -e ".[train]"', file=sys.stderr)
    raise SystemExit(2) from None

from moespec_jax.checkpoint.head.dflash_write import export_block_draft
from moespec_jax.checkpoint.head.write import FORMATS, check_exportable, export_draft
from moespec_jax.checkpoint.orbax_io import quiet_orbax
from moespec_jax.checkpoint.read import read_architectures
from moespec_jax.cli.arguments import short_name
from moespec_jax.cli.command import Parser, require_matplotlib, run_command, write_output
from moespec_jax.cli.process_flags import add_process_flags, join_processes
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import parse_numbers
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.parallel.processes import is_first_process
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train.arguments import (
    VARIANTS,
    add_block_flags,
    add_head_flags,
    add_optimizer_flags,
    add_spark_flags,
    add_training_flags,
)
from moespec_jax.train.block_config import block_config, dense_size, draft_vocabulary_size, spark_fields
from moespec_jax.train.left_out import LeftOut
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.records import Sample, read_samples
from moespec_jax.train.run import Pace, draw_training, train
from moespec_jax.train.trainer import AnyHead, BlockRecipe, Recipe, SparkRecipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for an error that the user can fix, 130 when interrupted."""
    return run_command(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    require_matplotlib("train")
    quiet_orbax()
    join_processes(arguments)
    held_out = [] if arguments.held_out is None else [arguments.held_out]
    source = {
        "model": short_name(arguments.model),
        "data": [describe_file(path) for path in arguments.data],
        "held_out": [describe_file(path) for path in held_out],
    }
    if arguments.last_answer_only:
        source["answers"] = "last"
    model = load(arguments.model, "none", dtype=arguments.dtype, progress=sys.stderr.isatty())
    recipe = recipe_of(arguments, model)
    left_out = LeftOut(arguments.output / "left_out.txt", arguments.stop_at_refused)
    samples = functools.partial(_samples, model, arguments.last_answer_only, left_out)
    head = train(
        model,
        recipe,
        lambda: samples(arguments.data),
        None if arguments.held_out is None else lambda: samples(held_out),
        arguments.output,
        Pace(arguments.save_every, arguments.evaluate_every),
        source,
    )
    if not is_first_process():
        return
    for warning in _export(head, recipe, arguments, model):
        print(f"note: {warning}", file=sys.stderr)
    draw_training(arguments.output / "log.jsonl", arguments.output / "training.png", recipe.batch * recipe.length)
    write_output(f"wrote {arguments.output / 'head'}\n")


def _export(head: AnyHead, recipe: Recipe, arguments: argparse.Namespace, model: Model) -> tuple[str, ...]:
    """Write the trained head; returns warnings."""
    named: dict[str, Any] = {
        "target": model.config, "target_name": short_name(arguments.model),
        "target_architectures": read_architectures(model.directory),
    }  # fmt: skip
    place = arguments.output / "head"
    if isinstance(head, DFlashHead):
        assert isinstance(recipe.draft, DFlashConfig)
        return export_block_draft(head, recipe.draft, place, shares_lm_head=True, **named)
    assert isinstance(recipe.draft, DraftConfig)
    embedding = model.params.embed
    return export_draft(head, recipe.draft, place, arguments.format, target_embedding=embedding, **named)


def recipe_of(arguments: argparse.Namespace, model: Model) -> Recipe:
    """Build the recipe of the flags for a target.

    Raises:
        RequestError: a number is out of range, or does not fit the target.
        CheckpointError: the requested format cannot express the head.
    """
    target = model.config
    if not 0 <= arguments.seed < 2**32:
        raise RequestError(f"expected a seed from 0 to {2**32 - 1}, got {arguments.seed}")
    for name in ("learning_rate", "adam_learning_rate", "decay", "warmup_steps", "confidence_weight"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < float("inf"):
            raise RequestError(f"expected --{name.replace('_', '-')} of at least 0, got {value}")
    block = arguments.head != "eagle3"
    draft = block_config(arguments, target) if block else draft_config(arguments, target)
    # Before the training, not after it.
    if isinstance(draft, DraftConfig):
        check_exportable(draft, arguments.format)
    unroll = draft.drafted if isinstance(draft, DFlashConfig) else arguments.unroll
    length = arguments.length or min(2048, target.context_length)
    if not unroll < length <= target.context_length:
        raise RequestError(
            f"expected --length above the {unroll} of {'a block' if block else '--unroll'} and of at most the target's"
            f" context of {target.context_length}; got {length}"
        )
    optimizer = OptimizerConfig(
        arguments.steps,
        arguments.optimizer,
        learning_rate=arguments.learning_rate,
        adam_learning_rate=arguments.adam_learning_rate,
        warmup_steps=arguments.warmup_steps,
        schedule=arguments.schedule,
    )
    settings: dict[str, Any] = {
        "batch": arguments.batch, "length": length, "unroll": unroll, "decay": arguments.decay, "loss": arguments.loss,
        "dtype": str(model.dtype), "seed": arguments.seed, "recompute": not arguments.no_recompute,
    }  # fmt: skip
    if not block:
        return Recipe(target, draft, optimizer, **settings)
    settings["anchors"] = min(arguments.anchors, length)
    if arguments.head == "dflash":
        return BlockRecipe(target, draft, optimizer, **settings)
    weight = arguments.confidence_weight
    return SparkRecipe(
        target, draft, optimizer, **settings, **({} if weight is None else {"confidence_weight": weight})
    )


def draft_config(arguments: argparse.Namespace, target: DecoderConfig) -> DraftConfig:
    """Build the settings of the head: attention has the target's shape; the base of the rotary embedding is EAGLE's,
    10000, for every target.

    Raises:
        RequestError: a size is out of range, two norms exclude each other, or the boundaries are not three that
            increase.
        CheckpointError: the boundaries are not numbers.
    """
    spark_fields(arguments)  # refuses them
    if arguments.fc_norm and arguments.norm_before_fc:
        raise RequestError("expected one of --fc-norm and --norm-before-fc; got both")
    return DraftConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocabulary_size(arguments, target),
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=arguments.intermediate_size or dense_size(target),
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        boundaries=boundaries(arguments.boundaries, target.num_hidden_layers),
        num_hidden_layers=arguments.layers or 1,
        # Some engines allocate a table of angles of this length, which must cover the target's context.
        max_position_embeddings=target.context_length,
        rms_norm_eps=target.rms_norm_eps,
        hidden_act=target.hidden_act,
        qk_norm="head" if arguments.qk_norm else "none",
        **{name: getattr(arguments, name) for name in VARIANTS},
    )


def boundaries(text: str | None, layers: int) -> tuple[int, ...]:
    """Parse the three boundaries that the head reads; `default_boundaries` without a text.

    Raises:
        CheckpointError: they are not numbers.
        RequestError: they are not three increasing numbers from 0 to `layers`.
    """
    values = default_boundaries(layers) if text is None else parse_numbers(text, "--boundaries")
    if len(values) != 3 or not 0 <= values[0] < values[1] < values[2] <= layers:
        raise RequestError(
            f"expected three strictly increasing boundaries from 0 to {layers}; got {', '.join(map(str, values))}"
            " (--boundaries)"
        )
    return values


def default_boundaries(layers: int) -> tuple[int, int, int]:
    """Choose boundaries of a target: 2, L/2 and L - 3 of L layers, as in EAGLE-3 (arXiv:2503.01840). With fewer than 7
    layers, of which these are not three, the first is moved down and the others up: 0 and L, which engines do not read
    everywhere, are chosen only where no others are left (L = 2 and 3).

    Raises:
        RequestError: there is one layer, which has two boundaries only.
    """
    if layers < 2:
        raise RequestError(f"expected a target of at least 2 layers, for a head that reads 3 boundaries; got {layers}")
    first = min(2, max(1, layers - 3), layers - 2)
    middle = max(layers // 2, first + 1)
    return first, middle, max(layers - 3, middle + 1)


def describe_file(path: Path) -> dict[str, Any]:
    """Identify a data file, wherever it is, by name, size and sha256: a run continues on the same data only.

    Raises:
        RequestError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"name": path.name, "bytes": file.seek(0, os.SEEK_END), "sha256": digest}
    except OSError as error:
        raise RequestError(f"expected a file of JSON lines at {path}; {error.strerror}") from None


def _samples(model: Model, last_only: bool, left_out: LeftOut, paths: Sequence[Path]) -> Iterator[Sample]:
    read = (read_samples(model, path, last_answer_only=last_only, leave_out=left_out) for path in paths)
    return left_out.report(itertools.chain.from_iterable(read))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m moespec_jax.train", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--model", required=True, help="target: directory or hub id")
    files.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="training data (JSON lines; see docs/training.md)",
    )
    files.add_argument(
        "--last-answer-only",
        action="store_true",
        help="of each chat, only the assistant's last turn counts (default: all of its turns)",
    )
    files.add_argument(
        "--stop-at-refused",
        action="store_true",
        help="stop at a chat that the target's template refuses or that has no answer; by default such chats are left"
        " out, counted, and named in DIR/left_out.txt",
    )
    files.add_argument("--held-out", type=Path, metavar="FILE", help="data that accuracy is measured on (JSON lines)")
    files.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="directory of the run; an existing run is continued"
    )
    files.add_argument(
        "--format",
        choices=FORMATS,
        default="specforge",
        help="format of DIR/head: specforge for SGLang, speculators for vLLM (default: %(default)s); that of DFlash and"
        " DSpark heads is always speculators",
    )
    add_head_flags(parser.add_argument_group("draft head"))
    add_block_flags(parser.add_argument_group("DFlash or DSpark head"))
    add_spark_flags(parser.add_argument_group("DSpark head"))
    add_training_flags(parser.add_argument_group("training"))
    add_optimizer_flags(parser.add_argument_group("optimizer"))
    add_process_flags(parser.add_argument_group("several processes, which share the batch and the output directory"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
