"""The tensor table of a checkpoint: every published name with its shape and its place in the parameters.

A place is a path into the parameters, of names and indices: `("layers", 3, "attention", "q")`, or
`("experts", sparse layer, expert, "gate")` for a matrix of an expert. Matrices of experts and gated MLPs, and `o`, are
published `[out, in]` and kept `[in, out]`.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moespec_jax.checkpoint.families import FAMILIES
from moespec_jax.config import AttentionConfig, DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.files import listing

Path = tuple[str | int, ...]
_LAYER = re.compile(r"model\.layers\.([0-9]{1,4})\.")


class Tensor(NamedTuple):
    """One published tensor.

    Fields:
        path: place in the parameters.
        shape: published shape.
        transpose: whether it is kept transposed.
        float32: whether it is kept in float32 at any dtype of the others.
    """

    path: Path
    shape: tuple[int, ...]
    transpose: bool = False
    float32: bool = False

    def reorient(self, array: np.ndarray) -> np.ndarray:
        """Convert an array from the published orientation to the kept one, or back."""
        return array.T if self.transpose else array


def tensor_table(config: DecoderConfig) -> dict[str, Tensor]:
    """List the tensors of a decoder's checkpoint by published name."""
    vocab, model = config.vocab_size, config.hidden_size
    table = {"model.embed_tokens.weight": Tensor(("embed",), (vocab, model))} | _norm(config, "model.norm", ("norm",))
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = Tensor(("lm_head",), (vocab, model))
    if config.lm_head_bias:
        table["lm_head.bias"] = Tensor(("lm_head_bias",), (vocab,))
    sparse = 0
    for i in range(config.num_hidden_layers):
        rows = _layer_table(config, ("layers", i))
        if config.sparse_layers[i]:
            rows |= _sparse_table(config, ("layers", i, "mlp"), sparse)
            sparse += 1
        else:
            rows |= mlp_table(
                FAMILIES[config.model_type].names.dense, ("layers", i, "mlp"), model, config.intermediate_size
            )
        table |= {f"model.layers.{i}.{name}": tensor for name, tensor in rows.items()}
    return table


def is_ignorable(config: DecoderConfig, name: str) -> bool:
    """Test whether a tensor outside the table is redundant: a rotary table, the copy of a tied embedding, or of layers
    that only predict further tokens (`Family.mtp`)."""
    if FAMILIES[config.model_type].mtp:
        layer = _LAYER.match(name)
        if name.startswith("model.mtp_") or (layer is not None and int(layer[1]) >= config.num_hidden_layers):
            return True
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def check_expert_count(config: DecoderConfig, tensors: int, where: pathlib.Path) -> None:
    """Refuse a config.json with far more experts than there are stored `tensors`, before its table is made: the size of
    the table is that of the config, which may be arbitrary.

    Raises:
        CheckpointError: there are too few tensors.
    """
    count = 3 * config.num_sparse_layers * config.num_experts
    if count > 1000 + 2 * tensors:
        raise CheckpointError(f"expected {count} matrices of experts; got {tensors} tensors in {where}")


def table_problems(
    table: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]
) -> dict[str, list[str]]:
    """List tensors that are unknown, missing or misshapen by the table. `ignored` tests names outside the table."""
    return {
        "unknown": [name for name in shapes if name not in table and not ignored(name)],
        "missing": [name for name in table if name not in shapes],
        "misshapen": [
            f"{name} (expected {list(tensor.shape)}, got {list(shapes[name])})"
            for name, tensor in table.items()
            if name in shapes and tensor.shape != shapes[name]
        ],
    }


def raise_problems(expected: str, problems: Mapping[str, Sequence[str]], where: pathlib.Path) -> None:
    """Raise one error that names all problems, which are given by kind.

    Raises:
        CheckpointError: there is a problem.
    """
    found = [f"{len(names)} {kind}: {listing(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"expected {expected}; got {'; '.join(found)} in {where}")


def attention_table(
    config: AttentionConfig, path: Path, *, heads: int, model: int, inputs: int, qkv_bias: bool, o_bias: bool
) -> dict[str, Tensor]:
    """List the tensors of an attention block at `path`, of so many query heads, that reads `inputs` features and writes
    `model`."""
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = {"self_attn.o_proj.weight": Tensor((*path, "o"), (model, q), transpose=True)}
    for name, width in (("q", q), ("k", kv), ("v", kv)):
        rows[f"self_attn.{name}_proj.weight"] = Tensor((*path, name), (width, inputs))
        if qkv_bias:
            rows[f"self_attn.{name}_proj.bias"] = Tensor((*path, f"{name}_bias"), (width,))
    if o_bias:
        rows["self_attn.o_proj.bias"] = Tensor((*path, "o_bias"), (model,))
    if config.qk_norm not in ("none", "unit"):
        widths = (q, kv) if config.qk_norm == "flat" else (config.head_dim, config.head_dim)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            rows[f"self_attn.{name}.weight"] = Tensor((*path, name), (width,))
    return rows


def mlp_table(prefix: str, path: Path, model: int, ffn: int) -> dict[str, Tensor]:
    """List the tensors of a gated MLP at `path`."""
    return {
        f"{prefix}gate_proj.weight": Tensor((*path, "gate"), (ffn, model), transpose=True),
        f"{prefix}up_proj.weight": Tensor((*path, "up"), (ffn, model), transpose=True),
        f"{prefix}down_proj.weight": Tensor((*path, "down"), (model, ffn), transpose=True),
    }


def _layer_table(config: DecoderConfig, path: Path) -> dict[str, Tensor]:
    """List the tensors of a layer outside its MLP."""
    model, heads = config.hidden_size, config.heads_of(int(path[1]))
    bias = {"qkv_bias": config.qkv_bias, "o_bias": config.o_bias}
    rows = attention_table(config, (*path, "attention"), heads=heads, model=model, inputs=model, **bias)
    second = "pre_mlp_layernorm" if config.output_norms else "post_attention_layernorm"
    norms = {"input_norm": "input_layernorm", "post_attention_norm": second} if config.input_norms else {}
    if config.output_norms:
        norms |= {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_mlp_layernorm"}
    for place, name in norms.items():
        rows |= _norm(config, name, (*path, place))
    if config.attention_sinks:
        rows["self_attn.sinks"] = Tensor((*path, "attention", "sinks"), (heads,))
    if config.output_gate != "none":
        gates = heads if config.output_gate_per_head else heads * config.head_dim
        rows["self_attn.gate_proj.weight"] = Tensor((*path, "attention", "output_gate"), (gates, model))
    names = FAMILIES[config.model_type].names.attention
    return {names.get(name, name): tensor for name, tensor in rows.items()}


def _norm(config: DecoderConfig, name: str, path: Path) -> dict[str, Tensor]:
    """List the tensors of a norm of the residual stream, called `name`, at `path`."""
    if not config.layer_norms:
        return {f"{name}.weight": Tensor(path, (config.hidden_size,))}
    return {f"{name}.{part}": Tensor((*path, part), (config.hidden_size,)) for part in ("weight", "bias")}


def _sparse_table(config: DecoderConfig, path: Path, sparse_layer: int) -> dict[str, Tensor]:
    """List the tensors of a sparse MLP; its experts' places count sparse layers."""
    names, model, ffn = FAMILIES[config.model_type].names, config.hidden_size, config.moe_intermediate_size
    rows = {names.router: Tensor((*path, "router"), (config.num_experts, model), float32=config.router.float32)}
    if config.router_bias:
        rows[names.router.removesuffix("weight") + "bias"] = Tensor((*path, "router_bias"), (config.num_experts,))
    for e in range(config.num_experts):
        expert = ("experts", sparse_layer, e)
        rows[names.gate.format(expert=e)] = Tensor((*expert, "gate"), (ffn, model), transpose=True)
        rows[names.up.format(expert=e)] = Tensor((*expert, "up"), (ffn, model), transpose=True)
        rows[names.down.format(expert=e)] = Tensor((*expert, "down"), (model, ffn), transpose=True)
        if config.expert_bias:  # a bias is a row
            for kind, name, out in (("gate", names.gate, ffn), ("up", names.up, ffn), ("down", names.down, model)):
                bias = name.removesuffix("weight").format(expert=e) + "bias"
                rows[bias] = Tensor((*expert, f"{kind}_bias"), (1, out))
    if config.router.correction:
        shape = (1, config.num_experts) if names.correction_row else (config.num_experts,)
        rows[names.correction] = Tensor((*path, "correction"), shape, float32=True)
    if width := config.shared_expert_intermediate_size:
        rows |= mlp_table(names.shared, (*path, "shared"), model, width)
        if config.shared_expert_gate:
            rows["mlp.shared_expert_gate.weight"] = Tensor((*path, "shared_gate"), (1, model))
    return rows
