"""Train an EAGLE-3 draft head: `python -m moespec_jax.train --model TARGET --data A.jsonl --output DIR`.

The target may be any model that this library runs; JSON lines hold text, chat or token ids (see `train/records.py`),
best those that `python -m moespec_jax.train.regenerate` writes. The same command continues a run that was cut off.
DIR/head is what SGLang or vLLM, and `--draft-model` here, load.
"""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moespec_jax.checkpoint.head.write import FORMATS, check_exportable, export_draft
from moespec_jax.checkpoint.orbax_io import quiet_orbax
from moespec_jax.checkpoint.read import read_architectures
from moespec_jax.cli.command import Parser, run_command, write_output
from moespec_jax.cli.process_flags import add_process_flags, join_processes
from moespec_jax.config import DecoderConfig, DraftConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import parse_numbers
from moespec_jax.parallel.processes import is_first_process
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train.objective import LOSSES
from moespec_jax.train.optimizer import OptimizerConfig
from moespec_jax.train.records import Sample, read_samples
from moespec_jax.train.run import Pace, draw_training, train
from moespec_jax.train.trainer import Recipe

_VARIANTS = {
    "fc_norm": "a norm for each tapped state",
    "norm_before_fc": "one norm over all tapped states",
    "norm_before_residual": "the residual stream starts from the normed feature",
    "norm_output": "a draft step hands on its normed output",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("expected matplotlib, which draws the run: pip install moespec_jax[train]")
    quiet_orbax()
    join_processes(arguments)
    held_out = [] if arguments.held_out is None else [arguments.held_out]
    source = {
        "model": _shown_name(arguments.model),
        "data": [describe_file(path) for path in arguments.data],
        "held_out": [describe_file(path) for path in held_out],
    }
    model = load(arguments.model, "none", dtype=arguments.dtype, progress=sys.stderr.isatty())
    recipe = recipe_of(arguments, model)
    head = train(
        model,
        recipe,
        lambda: _samples(model, arguments.data),
        lambda: _samples(model, held_out),
        arguments.output,
        Pace(arguments.save_every, arguments.evaluate_every),
        source,
    )
    if not is_first_process():
        return
    warnings = export_draft(
        head,
        recipe.draft,
        arguments.output / "head",
        arguments.format,
        target=model.config,
        target_name=_shown_name(arguments.model),
        target_architectures=read_architectures(model.directory),
        target_embedding=model.params.embed,
    )
    for warning in warnings:
        print(f"note: {warning}", file=sys.stderr)
    draw_training(arguments.output / "log.jsonl", arguments.output / "training.png", recipe.batch * recipe.length)
    write_output(f"wrote {arguments.output / 'head'}\n")


def recipe_of(arguments: argparse.Namespace, model: Model) -> Recipe:
    """What the command line asks for, for this target.

    Raises:
        RequestError: sizes do not fit the target.
        CheckpointError: the format asked for cannot express the head.
    """
    target = model.config
    if not 0 <= arguments.seed < 2**32:
        raise RequestError(f"expected a seed from 0 to {2**32 - 1}, got {arguments.seed}")
    for name in ("learning_rate", "adam_learning_rate", "decay", "warmup_steps"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise RequestError(f"expected --{name.replace('_', '-')} of at least 0, got {getattr(arguments, name)}")
    draft = draft_config(arguments, target)
    # Now, and not after the training.
    check_exportable(draft, arguments.format)
    length = arguments.length or min(2048, target.context_length)
    if not arguments.unroll < length <= target.context_length:
        raise RequestError(
            f"expected --length above the {arguments.unroll} of --unroll and of at most the target's context of"
            f" {target.context_length}; got {length}"
        )
    optimizer = OptimizerConfig(
        arguments.steps,
        arguments.optimizer,
        learning_rate=arguments.learning_rate,
        adam_learning_rate=arguments.adam_learning_rate,
        warmup_steps=arguments.warmup_steps,
        schedule=arguments.schedule,
    )
    return Recipe(
        target,
        draft,
        optimizer,
        batch=arguments.batch,
        length=length,
        unroll=arguments.unroll,
        decay=arguments.decay,
        loss=arguments.loss,
        dtype=str(model.dtype),
        seed=arguments.seed,
        recompute=not arguments.no_recompute,
    )


def draft_config(arguments: argparse.Namespace, target: DecoderConfig) -> DraftConfig:
    """The head: attention of the target's shape, and rotary embedding of EAGLE's base 10000, whatever the target's.

    Raises:
        RequestError: a size is out of range, or the boundaries are not three that increase.
    """
    draft_vocab = arguments.draft_vocab_size or min(32_000, target.vocab_size)
    if draft_vocab > target.vocab_size:
        raise RequestError(f"expected a draft vocabulary of at most {target.vocab_size} tokens; got {draft_vocab}")
    if arguments.fc_norm and arguments.norm_before_fc:
        raise RequestError("expected one of --fc-norm and --norm-before-fc; got both")
    return DraftConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=arguments.intermediate_size or _dense_size(target),
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        boundaries=boundaries(arguments.boundaries, target.num_hidden_layers),
        num_hidden_layers=arguments.layers,
        # Some engines make a table of angles of this length: it must reach as far as the target does.
        max_position_embeddings=target.context_length,
        rms_norm_eps=target.rms_norm_eps,
        hidden_act=target.hidden_act,
        qk_norm="head" if arguments.qk_norm else "none",
        **{name: getattr(arguments, name) for name in _VARIANTS},
    )


def _dense_size(target: DecoderConfig) -> int:
    """The target's own dense size where it has one besides its experts', else three times its width (speculators)."""
    dense, expert = target.intermediate_size, target.moe_intermediate_size
    return dense if dense != expert else 3 * target.hidden_size


def boundaries(text: str | None, layers: int) -> tuple[int, ...]:
    """Three tapped states: those named, else 2, L/2 and L - 3 (EAGLE-3's; arXiv:2503.01840).

    Raises:
        CheckpointError: they are not numbers.
        RequestError: they are not three increasing numbers from 0 to `layers`.
    """
    values = (2, layers // 2, layers - 3) if text is None else parse_numbers(text, "--boundaries")
    if len(values) != 3 or not 0 <= values[0] < values[1] < values[2] <= layers:
        origin = f"2, L/2, L - 3 with L = {layers}: name others with --boundaries" if text is None else "--boundaries"
        raise RequestError(
            f"expected three strictly increasing boundaries from 0 to {layers}; got {', '.join(map(str, values))}"
            f" ({origin})"
        )
    return values


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and sha256: what tells a continued run that its data are the same, wherever they lie.

    Raises:
        RequestError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"name": path.name, "bytes": file.tell(), "sha256": digest}
    except OSError as error:
        raise RequestError(f"expected a file of JSON lines at {path}; {error.strerror}") from None


def _samples(model: Model, paths: Sequence[Path]) -> Iterator[Sample]:
    for path in paths:
        yield from read_samples(model, path)


def _shown_name(model: str) -> str:
    """A hub id as it is; of a directory its name, for its place means nothing on another machine."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


_count.__name__ = "count"  # how argparse calls it in its errors


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m moespec_jax.train", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--model", required=True, help="the target: directory or hub id")
    files.add_argument("--data", required=True, nargs="+", type=Path, help="JSON lines to train on")
    files.add_argument("--held-out", type=Path, help="JSON lines to measure accuracy on")
    files.add_argument(
        "--output", required=True, type=Path, help="directory of the run; one that holds it continues it"
    )
    files.add_argument("--format", choices=FORMATS, default="specforge", help="of the head: for SGLang, or for vLLM")
    _add_head_flags(parser.add_argument_group("the head"))
    _add_training_flags(parser.add_argument_group("training"))
    add_process_flags(parser.add_argument_group("several processes, which share the batch and the output directory"))
    return parser


def _add_head_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--draft-vocab-size", type=_count, help="default: 32000, or all of a smaller vocabulary")
    group.add_argument("--boundaries", metavar="2,24,45", help="states of the target that it reads; default: 2,L/2,L-3")
    group.add_argument(
        "--intermediate-size", type=_count, help="default: the target's dense one, else 3 times its width"
    )
    group.add_argument("--layers", type=_count, default=1)
    for name, meaning in _VARIANTS.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=meaning)
    group.add_argument("--qk-norm", action="store_true", help="a norm over each query and key, as Qwen3 has")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    defaults = OptimizerConfig(steps=1)
    group.add_argument("--steps", type=_count, default=10_000, help="optimizer steps (%(default)s)")
    group.add_argument("--batch", type=_count, default=Recipe.batch, help="rows a step (%(default)s)")
    group.add_argument("--length", type=_count, help="tokens a row; default: 2048, or the target's shorter context")
    group.add_argument("--unroll", type=_count, default=Recipe.unroll, help="draft steps (%(default)s)")
    group.add_argument(
        "--decay", type=float, default=Recipe.decay, help="weight of a draft step's loss over the last's (%(default)s)"
    )
    group.add_argument("--loss", choices=list(LOSSES), default=Recipe.loss, help="(%(default)s)")
    group.add_argument("--optimizer", choices=["adamw", "muon"], default=defaults.name, help="(%(default)s)")
    group.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, help="under muon, of matrices (%(default)s)"
    )
    group.add_argument(
        "--adam-learning-rate",
        type=float,
        default=defaults.adam_learning_rate,
        help="muon's, of the rest (%(default)s)",
    )
    group.add_argument("--warmup-steps", type=int, default=defaults.warmup_steps, help="(%(default)s)")
    group.add_argument("--schedule", choices=["linear", "cosine"], default=defaults.schedule, help="(%(default)s)")
    group.add_argument("--seed", type=int, default=Recipe.seed)
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the target, and of arithmetic")
    group.add_argument("--save-every", type=_count, default=Pace.save_every, help="steps (%(default)s)")
    group.add_argument("--evaluate-every", type=_count, default=Pace.evaluate_every, help="steps (%(default)s)")
    group.add_argument("--no-recompute", action="store_true", help="keep activations: faster, and more memory")


if __name__ == "__main__":
    sys.exit(main())
