"""The tensor table of a checkpoint: every published name with its shape and its place in the parameters.

A place is a path into the parameters, written as names and numbers: `("layers", 3, "attention", "q")`, or for an
expert matrix `("experts", sparse layer, expert, "gate")`. Experts and gated MLPs are published `[out, in]` and kept
`[in, out]`.
"""

from typing import NamedTuple

from moespec_jax.checkpoint.families import FAMILIES
from moespec_jax.config import DecoderConfig

Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One published tensor: where it goes, its published shape, and whether it is transposed on the way."""

    path: Path
    shape: tuple[int, ...]
    transpose: bool = False


def tensor_table(config: DecoderConfig) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of this decoder must hold, by published name."""
    vocab, model = config.vocab_size, config.hidden_size
    table = {
        "model.embed_tokens.weight": Tensor(("embed",), (vocab, model)),
        "model.norm.weight": Tensor(("norm",), (model,)),
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = Tensor(("lm_head",), (vocab, model))
    sparse = 0
    for i in range(config.num_hidden_layers):
        rows = _layer_table(config, ("layers", i)) | _attention_table(config, ("layers", i, "attention"))
        if config.sparse_layers[i]:
            rows |= _sparse_table(config, ("layers", i, "mlp"), sparse)
            sparse += 1
        else:
            rows |= _mlp_table("mlp.", ("layers", i, "mlp"), model, config.intermediate_size)
        table |= {f"model.layers.{i}.{name}": tensor for name, tensor in rows.items()}
    return table


def expert_matrices(config: DecoderConfig) -> int:
    """How many of the table are matrices of experts, told without making it."""
    return 3 * config.num_sparse_layers * config.num_experts


def is_ignorable(config: DecoderConfig, name: str) -> bool:
    """Tensors some checkpoints carry that hold nothing new: rotary tables, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _layer_table(config: DecoderConfig, path: Path) -> dict[str, Tensor]:
    return {
        "input_layernorm.weight": Tensor((*path, "input_norm"), (config.hidden_size,)),
        "post_attention_layernorm.weight": Tensor((*path, "post_attention_norm"), (config.hidden_size,)),
    }


def _attention_table(config: DecoderConfig, path: Path) -> dict[str, Tensor]:
    model = config.hidden_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = {"self_attn.o_proj.weight": Tensor((*path, "o"), (model, q), transpose=True)}
    for name, width in (("q", q), ("k", kv), ("v", kv)):
        rows[f"self_attn.{name}_proj.weight"] = Tensor((*path, name), (width, model))
        if config.qkv_bias:
            rows[f"self_attn.{name}_proj.bias"] = Tensor((*path, f"{name}_bias"), (width,))
    if config.o_bias:
        rows["self_attn.o_proj.bias"] = Tensor((*path, "o_bias"), (model,))
    if config.qk_norm != "none":
        widths = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (q, kv)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            rows[f"self_attn.{name}.weight"] = Tensor((*path, name), (width,))
    return rows


def _sparse_table(config: DecoderConfig, path: Path, sparse_layer: int) -> dict[str, Tensor]:
    names, model, ffn = FAMILIES[config.model_type].names, config.hidden_size, config.moe_intermediate_size
    rows = {names.router: Tensor((*path, "router"), (config.num_experts, model))}
    for e in range(config.num_experts):
        place = ("experts", sparse_layer, e)
        rows[names.gate.format(expert=e)] = Tensor((*place, "gate"), (ffn, model), transpose=True)
        rows[names.up.format(expert=e)] = Tensor((*place, "up"), (ffn, model), transpose=True)
        rows[names.down.format(expert=e)] = Tensor((*place, "down"), (model, ffn), transpose=True)
    if width := config.shared_expert_intermediate_size:
        rows |= _mlp_table("mlp.shared_expert.", (*path, "shared"), model, width)
        rows["mlp.shared_expert_gate.weight"] = Tensor((*path, "shared_gate"), (1, model))
    return rows


def _mlp_table(prefix: str, path: Path, model: int, ffn: int) -> dict[str, Tensor]:
    return {
        f"{prefix}gate_proj.weight": Tensor((*path, "gate"), (ffn, model), transpose=True),
        f"{prefix}up_proj.weight": Tensor((*path, "up"), (ffn, model), transpose=True),
        f"{prefix}down_proj.weight": Tensor((*path, "down"), (model, ffn), transpose=True),
    }
