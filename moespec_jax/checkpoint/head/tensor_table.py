"""The tensor table of a draft head: every canonical name with its shape and its place in the parameters. Also random
heads, from which training starts.

Canonical names are those of EAGLE's repository (arXiv:2503.01840): `midlayer.*` for the first layer and
`midlayer.{i}.*` for others. `canonical_name` converts those of other formats. `fc`, `o` and the MLP are published
`[out, in]` and kept `[in, out]`.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moespec_jax.checkpoint.tensor_table import Path, Tensor, attention_table, mlp_table
from moespec_jax.config import DraftConfig
from moespec_jax.nn.attention import Attention
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.dflash import DFlashHead
from moespec_jax.nn.eagle3 import DraftHead, DraftLayer
from moespec_jax.nn.layers import GatedMlp, norm_weight

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
O_BIAS = "midlayer.self_attn.o_proj.bias"
_LAYER = re.compile(r"(?:layers|midlayer)\.([0-9]{1,4})\.(.+)")
_ROTARY = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def canonical_name(name: str) -> str:
    """Convert a published name to EAGLE's spelling: no leading `model.`, and `midlayer.{i}.` for `layers.{i}.`."""
    name = name.removeprefix("model.")
    if match := _LAYER.fullmatch(name):
        return layer_prefix(int(match[1])) + match[2]
    return name


def layer_prefix(layer: int) -> str:
    """Prefix of the canonical names of a layer's tensors."""
    return f"midlayer.{layer}." if layer else "midlayer."


def layer_number(name: str) -> int | None:
    """Layer of a canonical name; None outside the layers."""
    if match := _LAYER.fullmatch(name):
        return int(match[1])
    return 0 if name.startswith("midlayer.") else None


def is_ignorable(name: str) -> bool:
    """Test whether a tensor is redundant: a rotary table."""
    return _ROTARY.fullmatch(name) is not None


def draft_table(config: DraftConfig, o_bias: bool = False, lm_head: bool = True) -> dict[str, Tensor]:
    """List the float tensors of a head by canonical name.

    `o_bias`: whether attention with biases has one on its output too; published heads differ in that, and their configs
    do not state it. `lm_head`: whether there is an output matrix; a head without one shares the target's.
    """
    model = config.hidden_size
    table = {
        "fc.weight": Tensor(("fc",), (model, config.aux_size), transpose=True),
        "norm.weight": Tensor(("norm",), (model,)),
    }
    if lm_head:
        table[LM_HEAD] = Tensor(("lm_head",), (config.draft_vocab_size, model))
    if config.fc_bias:
        table["fc.bias"] = Tensor(("fc_bias",), (model,))
    if config.norm_before_fc:
        table["input_norm.weight"] = Tensor(("fc_norms", 0), (config.aux_size,))
    if config.fc_norm:
        for i in range(len(config.boundaries)):
            table[f"fc_norm.{i}.weight"] = Tensor(("fc_norms", i), (config.target_hidden_size,))
    if config.own_embedding:
        table[EMBEDDING] = Tensor(("embed",), (config.vocab_size, model))
    for i in range(config.num_hidden_layers):
        table |= {layer_prefix(i) + name: tensor for name, tensor in _layer_table(config, i, o_bias).items()}
    return table


def build_head(config: DraftConfig, leaves: Mapping[Path, Any]) -> DraftHead:
    """Build a head of its leaves, by their paths; `("target_ids",)` is one of them."""
    layers = []
    for i in range(config.num_hidden_layers):
        at = ("layers", i)
        attention: dict[str, Any] = {
            name: leaves.get((*at, "attention", name)) for name in Attention.__dataclass_fields__
        }
        layers.append(
            DraftLayer(
                input_norm=leaves[(*at, "input_norm")],
                hidden_norm=leaves.get((*at, "hidden_norm")),
                attention=Attention(**attention),
                post_attention_norm=leaves[(*at, "post_attention_norm")],
                mlp=GatedMlp(*(leaves[(*at, "mlp", name)] for name in ("gate", "up", "down"))),
            )
        )
    norms = len(config.boundaries) if config.fc_norm else int(config.norm_before_fc)
    return DraftHead(
        fc=leaves[("fc",)],
        layers=tuple(layers),
        norm=leaves[("norm",)],
        lm_head=leaves.get(("lm_head",)),
        target_ids=leaves[("target_ids",)],
        fc_bias=leaves.get(("fc_bias",)),
        fc_norms=tuple(leaves[("fc_norms", i)] for i in range(norms)),
        embed=leaves.get(("embed",)),
    )


def leaf_at(head: DraftHead | DFlashHead, path: Path) -> Any:
    """Return the parameter at a path of the table; None where the head has none."""
    node: Any = head
    for step in path:
        if node is None:
            return None
        if isinstance(step, int):
            node = node[step] if step < len(node) else None
        else:
            node = getattr(node, step)
    return node


def random_head(config: DraftConfig, target: Decoder, target_ids: Int[Array, " draft_vocab"], key: Array) -> DraftHead:
    """Draw a head to start training from, float32. Output matrix and last norm are the target's, all else is random."""
    d, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv, f = config.num_key_value_heads * config.head_dim, config.intermediate_size
    keys = iter(jax.random.split(key, 7 * config.num_hidden_layers + 1))

    def normal(*shape: int, fan_in: int) -> Array:
        return jax.random.normal(next(keys), shape, jnp.float32) * fan_in**-0.5

    def layer(first: bool) -> DraftLayer:
        width = 2 * d if first else d
        attention = Attention(
            q=normal(q, width, fan_in=width), k=normal(kv, width, fan_in=width), v=normal(kv, width, fan_in=width),
            o=normal(q, d, fan_in=q) * 0.1,
            q_norm=jnp.ones(config.head_dim) if config.qk_norm == "head" else None,
            k_norm=jnp.ones(config.head_dim) if config.qk_norm == "head" else None,
        )  # fmt: skip
        mlp = GatedMlp(normal(d, f, fan_in=d), normal(d, f, fan_in=d), normal(f, d, fan_in=f) * 0.1)
        return DraftLayer(jnp.ones(d), jnp.ones(d) if first else None, attention, jnp.ones(d), mlp)

    unembedding = target.embed if target.lm_head is None else target.lm_head
    norms = {"norm_before_fc": [config.aux_size], "fc_norm": [config.target_hidden_size] * len(config.boundaries)}
    widths = [width for name, sizes in norms.items() if getattr(config, name) for width in sizes]
    return DraftHead(
        fc=normal(config.aux_size, d, fan_in=config.aux_size),
        layers=tuple(layer(i == 0) for i in range(config.num_hidden_layers)),
        norm=norm_weight(target.norm).astype(jnp.float32),
        lm_head=unembedding[target_ids].astype(jnp.float32),
        target_ids=target_ids,
        fc_norms=tuple(jnp.ones(width) for width in widths),
    )


def _layer_table(config: DraftConfig, layer: int, o_bias: bool) -> dict[str, Tensor]:
    """List the tensors of a layer. The first has a second norm, and its attention reads embedding and feature
    concatenated."""
    model, at, first = config.hidden_size, ("layers", layer), layer == 0
    norms = {"input_layernorm.weight": Tensor((*at, "input_norm"), (model,))}
    if first:
        norms["hidden_norm.weight"] = Tensor((*at, "hidden_norm"), (model,))
    norms["post_attention_layernorm.weight"] = Tensor((*at, "post_attention_norm"), (model,))
    attention = attention_table(
        config,
        (*at, "attention"),
        heads=config.num_attention_heads,
        model=model,
        inputs=2 * model if first else model,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias and o_bias,
    )
    return norms | mlp_table("mlp.", (*at, "mlp"), model, config.intermediate_size) | attention
