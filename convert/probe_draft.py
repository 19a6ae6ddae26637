"""Test whether a draft head was trained on the boundaries that its files state, or on those one layer below or above.

    python -m convert.probe_draft --model TARGET --draft-model DIR [--text FILE | --ids FILE]

With wrong boundaries a head still runs and the output is still exact, but acceptance collapses. The probe therefore
measures, on a text, the accuracy of the head's first drafted token with the boundaries shifted by -1, 0 and 1.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import moespec_jax
from convert import Parser, make_parser, run
from moespec_jax.checkpoint.dtypes import FLOAT_DTYPES
from moespec_jax.checkpoint.head.read import LoadedBlockDraft, LoadedDraft
from moespec_jax.cli.arguments import boundaries_of
from moespec_jax.errors import CheckpointError
from moespec_jax.files import parse_numbers
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.train.blocks import block_scores
from moespec_jax.train.objective import LOSSES, StepScore, Teacher, run_teacher, unrolled_scores

_LONGEST, _BLOCKS = 512, 64
# Default text: sources of this library. Any text like the target's training data is suitable.
_TEXT = tuple(
    Path(moespec_jax.__file__).parent / name
    for name in ("runtime/model.py", "nn/decoder.py", "checkpoint/tokenizer.py", "decoding/tree.py")
)


class Finding(NamedTuple):
    """Result for one shift.

    Fields:
        shift: shift of the boundaries.
        boundaries: shifted boundaries.
        hits: number of positions at which the head's first token is the target's most probable token.
        positions: number of positions.
    """

    shift: int
    boundaries: tuple[int, ...]
    hits: float
    positions: float

    @property
    def accuracy(self) -> float:
        """Share of positions that are hits."""
        return self.hits / max(self.positions, 1.0)


def main() -> int:
    """Run the probe of the command line."""
    arguments = _parser().parse_args()
    model = load(
        arguments.model,
        arguments.draft_model,
        draft_boundaries=boundaries_of(arguments),
        dtype=arguments.dtype,
    )
    if not isinstance(model.draft, LoadedDraft | LoadedBlockDraft):
        raise CheckpointError(f"expected a draft head; got {arguments.draft_model!r}")
    rows = _rows(_token_ids(model, arguments.text, arguments.ids), model.config.context_length, arguments.tokens)
    findings = probe(model, model.draft, rows)
    chosen = next(finding for finding in findings if finding.shift == 0)
    # The loader's choice wins ties.
    best = max(findings, key=lambda finding: (finding.accuracy, finding is chosen))
    print(f"the loader chose {model.draft.notes[0]}")
    print(f"{'shift':>5}  {'boundaries':<16}  accuracy of the first drafted token")
    for finding in findings:
        marks = " best" * (finding is best) + " (the loader's choice)" * (finding is chosen)
        print(f"{finding.shift:>+5}  {_listed(finding.boundaries):<16}  {finding.accuracy:.4f}{marks}")
    print(f"over {int(chosen.positions)} tokens; {_advice(best, chosen)}")
    return 0


def probe(model: Model, draft: LoadedDraft | LoadedBlockDraft, rows: np.ndarray) -> list[Finding]:
    """Measure first-token accuracy on `rows` `[rows, tokens]` with the boundaries shifted by -1, 0 and 1, where the
    target has them. The target runs once on every row."""
    shifted = {shift: tuple(b + shift for b in draft.config.boundaries) for shift in (-1, 0, 1)}
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    shifted = {shift: bs for shift, bs in shifted.items() if 0 <= bs[0] and bs[-1] <= layers}
    union = tuple(sorted({b for boundaries in shifted.values() for b in boundaries}))

    @jax.jit
    def scores(params: Decoder, head: DraftHead | DFlashHead, tokens: jax.Array) -> list[StepScore]:
        assert head.target_ids is not None
        teacher = run_teacher(model.config, params, model.backend, union, head.target_ids, tokens)
        states = jnp.split(teacher.aux_hidden_states, len(union), axis=-1)
        valid, found = jnp.ones(tokens.shape, bool), []
        for boundaries in shifted.values():
            aux = jnp.concatenate([states[union.index(b)] for b in boundaries], axis=-1)
            assert aux.shape[-1] == len(boundaries) * width
            found.append(
                _first_token(draft, head, params.embed, teacher._replace(aux_hidden_states=aux), tokens, valid)
            )
        return found

    hits, positions = np.zeros(len(shifted)), np.zeros(len(shifted))
    for row in rows:
        found = scores(model.params, draft.head, jnp.asarray(row, jnp.int32)[None, :])
        hits += [float(score.hits) for score in found]
        positions += [float(score.positions) for score in found]
    return [Finding(s, bs, *x) for (s, bs), *x in zip(shifted.items(), hits.tolist(), positions.tolist(), strict=True)]


def _first_token(
    draft: LoadedDraft | LoadedBlockDraft,
    head: Any,
    embed: jax.Array,
    teacher: Teacher,
    tokens: jax.Array,
    valid: jax.Array,
) -> StepScore:
    """Score the first drafted token: of an EAGLE-3 head after every token, of a DFlash head after `_BLOCKS` a row."""
    loss = LOSSES["cross-entropy"]
    if isinstance(draft, LoadedDraft):
        return unrolled_scores(draft.config, head, embed, teacher, tokens, valid, 1, loss, False)[0]
    places = np.unique(np.linspace(1, tokens.shape[1] - 2, _BLOCKS).astype(np.int32))
    anchors = jnp.broadcast_to(jnp.asarray(places)[None, :], (len(tokens), len(places)))
    return block_scores(draft.config, head, embed, teacher, tokens, valid, anchors, loss)[0]


def _token_ids(model: Model, text: Path | None, ids: Path | None) -> list[int]:
    """Read token ids from a file, or encode a text file (default: sources of this library)."""
    if ids is not None:
        numbers = parse_numbers(_read(ids).replace("\n", ",").strip(","), str(ids))
        if not all(0 <= i < model.config.vocab_size for i in numbers):
            raise CheckpointError(f"expected token ids from 0 to {model.config.vocab_size - 1} in {ids}")
        return list(numbers)
    if model.tokenizer is None:
        raise CheckpointError(f"expected token ids (--ids FILE): {model.directory} has no tokenizer")
    return model.encode("".join(map(_read, _TEXT if text is None else (text,))))


def _rows(ids: list[int], context: int, tokens: int) -> np.ndarray:
    """Cut about `tokens` ids into rows of equal length `[rows, length]`."""
    length = min(len(ids), context, _LONGEST)
    if length < 3:
        raise CheckpointError(f"expected a text of at least 3 tokens; it has {len(ids)}")
    count = min(len(ids) // length, max(tokens // length, 1))
    return np.array(ids[: count * length], np.int32).reshape(count, length)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"expected UTF-8 text in {file}") from None


def _listed(boundaries: tuple[int, ...]) -> str:
    return ",".join(map(str, boundaries))


def _advice(best: Finding, chosen: Finding) -> str:
    if best is chosen:
        return "the loader's choice is the best"
    return f"this head seems to read other boundaries: use --draft-boundaries {_listed(best.boundaries)}"


def _parser() -> Parser:
    parser = make_parser("probe_draft", __doc__)
    parser.add_argument("--model", required=True, help="the target: directory or hub id")
    parser.add_argument("--draft-model", required=True, help="the head: directory or hub id")
    parser.add_argument(
        "--draft-boundaries", metavar="2,24,45", help="boundaries in place of those of the head's files"
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text", type=Path, help="text file (default: sources of this library)")
    texts.add_argument("--ids", type=Path, help="file of token ids, separated by commas or lines")
    parser.add_argument("--tokens", type=int, default=2048, help="approximate number of tokens (default: 2048)")
    parser.add_argument(
        "--dtype", choices=FLOAT_DTYPES, help="dtype of weights (default: float32 on CPU, else bfloat16)"
    )
    return parser


if __name__ == "__main__":
    run(main)
