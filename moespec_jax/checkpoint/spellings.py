"""Other spellings of a target's tensors, converted to the names of the tensor table.

transformers 5 can write a model as it keeps it in memory: Mixtral's sparse block is called `mlp` as in other families,
and the experts of a layer are fused into `experts.gate_up_proj` `[experts, 2 * ffn, model]`, gate above up, and
`experts.down_proj` `[experts, model, ffn]`; some families publish such tensors, in forms of their own (`FusedForm`).
The matrix of an expert is a part of such a tensor, and is read as if it were stored alone. Of tied matrices, some
writers store only the output matrix. Tensors of a text model inside another model have a prefix (`wrappers.py`).
"""

import re

from moespec_jax.checkpoint.families import FAMILIES
from moespec_jax.checkpoint.fused import Fused, entries_of, fused_shared, fused_tensor
from moespec_jax.checkpoint.shards import Headers
from moespec_jax.checkpoint.wrappers import text_name
from moespec_jax.config import DecoderConfig

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SPARSE_BLOCK = re.compile(
    r"(model\.layers\.[0-9]{1,4}\.)(?:mlp|block_sparse_moe|feed_forward)\."
    r"(gate\.weight|(?:gate\.)?(?:moe_statics\.)?e_score_correction_bias"
    r"|router\.weight|(?:input|output)_linear\.weight|(?:shared_)?experts\..+)"
)

_SHARED = re.compile(r"(model\.layers\.[0-9]{1,4}\.)(shared_mlp\..+)")


def unify_names(config: DecoderConfig, headers: Headers) -> tuple[Headers, list[str]]:
    """Convert headers to the names of the tensor table; also describe fused tensors of another shape than expected.

    A tensor that is stored in two spellings is among the duplicates.
    """
    found, misshapen = Headers({}, list(headers.duplicates)), []
    for stored, entry in headers.entries.items():
        name = text_name(config.model_type, stored)
        if name is None:
            continue
        parts = {_table_name(config, name): entry}
        if fused := _fused(config, name):
            if entry.shape != fused.shape:
                misshapen.append(f"{stored} (expected {list(fused.shape)}, got {list(entry.shape)})")
                continue
            parts = entries_of(fused, entry)
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
    (layer, rest), names = match.groups(), FAMILIES[config.model_type].names
    if rest in ("gate.weight", "router.weight"):
        return layer + names.router
    if rest.endswith("e_score_correction_bias"):
        return layer + names.correction if config.router.correction else name
    if rest.startswith("shared_experts.") and config.shared_expert_intermediate_size:
        return layer + names.shared + rest.removeprefix("shared_experts.")
    return layer + names.sparse_block + rest


def _fused(config: DecoderConfig, name: str) -> Fused | None:
    """Describe the fused experts of this name; None where it is another tensor's."""
    match = _SPARSE_BLOCK.fullmatch(name)
    if match is not None:
        return fused_tensor(config, match[1], match[2])
    shared = _SHARED.fullmatch(name)
    return None if shared is None else fused_shared(config, shared[1], shared[2])
