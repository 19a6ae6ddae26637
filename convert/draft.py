"""Convert a draft head into one that SGLang (specforge, EAGLE-3 only) or vLLM (speculators) loads.

python -m convert.draft --model TARGET --draft-model DIR --output DIR2 --format specforge [--dtype bfloat16]
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import ALLOW_NON_FINITE, Parser, add_output_flags, atomic_directory, make_parser, run
from convert.integrity import check_finite
from moespec_jax.checkpoint.head.dflash_write import export_block_draft
from moespec_jax.checkpoint.head.read import LoadedBlockDraft, LoadedDraft, load_any_draft, share_lm_head
from moespec_jax.checkpoint.head.write import FORMATS, export_draft
from moespec_jax.checkpoint.hub import locate
from moespec_jax.checkpoint.read import load_config, open_source, read_architectures
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import RequestError
from moespec_jax.files import parse_numbers
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def main() -> int:
    """Run the conversion of the command line."""
    arguments = _parser().parse_args()
    model = locate(arguments.model)
    target = load_config(model)
    draft = locate(arguments.draft_model, torch_archives=True)
    boundaries = None if arguments.boundaries is None else parse_numbers(arguments.boundaries, "--boundaries")
    loaded = load_any_draft(draft, target, None, name=arguments.draft_model, boundaries=boundaries)
    shares_lm_head = loaded.head.lm_head is None
    if isinstance(loaded, LoadedBlockDraft) and arguments.format != "speculators":
        raise RequestError(f"expected --format speculators for a DFlash head; got {arguments.format}")
    if shares_lm_head and isinstance(loaded, LoadedDraft):
        output = _EMBEDDING if target.tie_word_embeddings else _LM_HEAD
        loaded = share_lm_head(loaded, jnp.asarray(_read_target(model, target, output)))
    if not arguments.allow_non_finite:
        check_finite(_floats(loaded.head), f"{ALLOW_NON_FINITE} converts it unchanged")
    named: dict[str, Any] = {
        "target": target, "dtype": arguments.dtype, "target_name": arguments.target_name or arguments.model,
        "target_architectures": read_architectures(model),
    }  # fmt: skip
    with atomic_directory(arguments.output) as directory:
        if isinstance(loaded, LoadedBlockDraft):
            warnings = export_block_draft(loaded.head, loaded.config, directory, shares_lm_head=shares_lm_head, **named)
        else:
            needs_embedding = arguments.format == "speculators" and loaded.head.embed is None
            embedding = _read_target(model, target, _EMBEDDING) if needs_embedding else None
            warnings = export_draft(
                loaded.head, loaded.config, directory, arguments.format, target_embedding=embedding, **named
            )
    for note in (*loaded.notes, *warnings):
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {arguments.output}")
    return 0


def _parser() -> Parser:
    parser = make_parser("draft", __doc__)
    parser.add_argument("--model", required=True, help="the target: directory or hub id")
    parser.add_argument(
        "--draft-model", required=True, help="the head: EAGLE-3, DFlash or DSpark, in any format that can be read"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="specforge for SGLang (EAGLE-3 heads only), speculators for vLLM",
    )
    parser.add_argument("--boundaries", help="boundaries such as 2,24,45, in place of those of the head's files")
    parser.add_argument("--target-name", help="name of the target in the output (default: --model)")
    add_output_flags(parser)
    return parser


def _read_target(model: Path, target: DecoderConfig, name: str) -> np.ndarray:
    """Read a tensor of the target."""
    return next(array.copy() for _, array in open_source(model, target).read([name]))


def _floats(head: DraftHead | DFlashHead) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the head's float parameters, by their paths."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(head):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            yield jax.tree_util.keystr(path).removeprefix("."), np.asarray(leaf)


if __name__ == "__main__":
    run(main)
