"""Turn an EAGLE-3 draft head into one that SGLang (specforge) or vLLM (speculators) loads.

python -m convert.draft --model TARGET --draft-model DIR --output DIR2 --format specforge [--dtype bfloat16]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import DTYPES, Parser, run, whole_directory
from convert.integrity import ALLOW, refuse_not_finite
from moespec_jax.checkpoint.head.read import load_draft
from moespec_jax.checkpoint.head.write import FORMATS, export_draft
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, open_source, read_architectures
from moespec_jax.config import DecoderConfig
from moespec_jax.files import parse_numbers
from moespec_jax.nn.eagle3 import DraftHead

_EMBEDDING = "model.embed_tokens.weight"


def main() -> int:
    """Convert as the command line says."""
    arguments = _parser().parse_args()
    model = locate(arguments.model)
    target = load_config(model)
    draft = locate(arguments.draft_model, torch_archives=True)
    boundaries = None if arguments.boundaries is None else parse_numbers(arguments.boundaries, "--boundaries")
    loaded = load_draft(draft, target, None, name=arguments.draft_model, boundaries=boundaries)
    if not arguments.allow_non_finite:
        refuse_not_finite(_floats(loaded.head), f"{ALLOW} converts it as it is")
    needed = arguments.format == "speculators" and loaded.head.embed is None
    embedding = _read_embedding(model, target) if needed else None
    with whole_directory(arguments.output) as directory:
        warnings = export_draft(
            loaded.head,
            loaded.config,
            directory,
            arguments.format,
            target=target,
            dtype=arguments.dtype,
            target_name=arguments.target_name or arguments.model,
            target_architectures=read_architectures(model),
            target_embedding=embedding,
        )
    for note in (*loaded.notes, *warnings):
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {arguments.output}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m convert.draft", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="the target: directory or hub id")
    parser.add_argument("--draft-model", required=True, help="the head, of EAGLE's, SpecForge's or speculators' format")
    parser.add_argument("--output", required=True, type=Path, help="directory to be made; must not hold anything")
    parser.add_argument("--format", required=True, choices=FORMATS, help="specforge for SGLang, speculators for vLLM")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of all parameters (default: as they are)")
    parser.add_argument("--boundaries", help="tapped states as 2,24,45 in place of what the head's files say")
    parser.add_argument("--target-name", help="what the output calls the target (default: as --model says)")
    parser.add_argument(ALLOW, action="store_true", help="also weights that are NaN or infinite")
    return parser


def _read_embedding(model: Path, target: DecoderConfig) -> np.ndarray:
    """The target's embedding `[vocab, model]`."""
    return next(array.copy() for _, array in open_source(model, target).read([_EMBEDDING]))


def _floats(head: DraftHead) -> Iterator[tuple[str, np.ndarray]]:
    """The head's weights, by their places in it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(head):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            yield jax.tree_util.keystr(path).removeprefix("."), np.asarray(leaf)


if __name__ == "__main__":
    run(main)
