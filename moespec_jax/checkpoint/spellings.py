"""Other spellings of a target's tensors, converted to the names of the tensor table.

transformers 5 can write a model as it keeps it in memory: Mixtral's sparse block is called `mlp` as in other families,
and the experts of a layer are fused into `experts.gate_up_proj` `[experts, 2 * ffn, model]`, gate above up, and
`experts.down_proj` `[experts, model, ffn]`. The matrix of an expert is a contiguous part of such a tensor, and is read
as if it were stored alone. Of tied matrices, some writers store only the output matrix.
"""

import re
from typing import NamedTuple

from moespec_jax.checkpoint.families import FAMILIES
from moespec_jax.checkpoint.shards import Entry, Headers
from moespec_jax.config import DecoderConfig

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SPARSE_BLOCK = re.compile(r"(model\.layers\.[0-9]{1,4}\.)(?:mlp|block_sparse_moe)\.(gate\.weight|experts\..+)")


class _Fused(NamedTuple):
    """Matrices of a layer's experts in one tensor.

    Fields:
        shape: shape of the tensor.
        matrix: shape of one matrix.
        names: names of the matrices, in their order.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, int]
    names: list[str]


def unify_names(config: DecoderConfig, headers: Headers) -> tuple[Headers, list[str]]:
    """Convert headers to the names of the tensor table; also describe fused tensors of another shape than expected.

    A tensor that is stored in two spellings is among the duplicates.
    """
    found, misshapen = Headers({}, list(headers.duplicates)), []
    for stored, entry in headers.entries.items():
        parts = {_table_name(config, stored): entry}
        if fused := _fused(config, stored):
            if entry.shape != fused.shape:
                misshapen.append(f"{stored} (expected {list(fused.shape)}, got {list(entry.shape)})")
                continue
            parts = _parts(fused, entry)
        found.duplicates.extend(f"{name} (also as {stored})" for name in parts if name in found.entries)
        found.entries.update(parts)
    if config.tie_word_embeddings and LM_HEAD in found.entries:
        found.entries.setdefault(EMBEDDING, found.entries[LM_HEAD])
    return found, misshapen


def _table_name(config: DecoderConfig, name: str) -> str:
    """Rename the sparse block as the family's original checkpoints do."""
    match = _SPARSE_BLOCK.fullmatch(name)
    if match is None:
        return name
    return match[1] + FAMILIES[config.model_type].names.router.removesuffix("gate.weight") + match[2]


def _fused(config: DecoderConfig, name: str) -> _Fused | None:
    """Describe the fused experts of this name; None where it is another tensor's."""
    match = _SPARSE_BLOCK.fullmatch(name)
    if match is None or match[2] not in ("experts.gate_up_proj", "experts.down_proj"):
        return None
    names, experts = FAMILIES[config.model_type].names, config.num_experts
    ffn, model = config.moe_intermediate_size, config.hidden_size
    down = match[2] == "experts.down_proj"
    kinds, matrix = ((names.down,), (model, ffn)) if down else ((names.gate, names.up), (ffn, model))
    shape = (experts, len(kinds) * matrix[0], matrix[1])
    return _Fused(shape, matrix, [match[1] + kind.format(expert=e) for e in range(experts) for kind in kinds])


def _parts(fused: _Fused, entry: Entry) -> dict[str, Entry]:
    """Describe each matrix as a tensor of its own."""
    size = entry.size // len(fused.names)
    return {
        name: entry._replace(shape=fused.matrix, start=entry.start + i * size, size=size)
        for i, name in enumerate(fused.names)
    }
