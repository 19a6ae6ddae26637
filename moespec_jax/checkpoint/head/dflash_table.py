"""The tensor table of a DFlash or DSpark head: every published name with its shape and its place in the parameters.
Names are the same in all formats, but for a leading `model.`. Also random heads, from which training starts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moespec_jax.checkpoint.head.tensor_table import EMBEDDING, LM_HEAD
from moespec_jax.checkpoint.tensor_table import Path, Tensor, attention_table, mlp_table
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.attention import Attention
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.dflash import ConfidenceHead, DFlashHead, MarkovBias
from moespec_jax.nn.eagle3 import DraftLayer
from moespec_jax.nn.layers import GatedMlp, norm_weight

# The verifier's parts in older files of speculators, which no pass reads.
_VERIFIER = ("verifier_norm.weight", "verifier_lm_head.weight")


def published_name(name: str) -> str:
    """Name without a leading `model.`."""
    return name.removeprefix("model.")


def is_ignorable(name: str) -> bool:
    """Test whether a tensor is redundant: a rotary table, or a copy of a part of the target."""
    return name in _VERIFIER or "rotary_emb." in name


def block_table(config: DFlashConfig, lm_head: bool = True) -> dict[str, Tensor]:
    """List the float tensors of a head by published name. `lm_head`: whether there is an output matrix; a head without
    one shares the target's."""
    model = config.hidden_size
    table = {
        "fc.weight": Tensor(("fc",), (model, config.aux_size), transpose=True),
        "hidden_norm.weight": Tensor(("hidden_norm",), (model,)),
        "norm.weight": Tensor(("norm",), (model,)),
    }
    if lm_head:
        table[LM_HEAD] = Tensor(("lm_head",), (config.draft_vocab_size, model))
    if config.own_embedding:
        table[EMBEDDING] = Tensor(("embed",), (config.vocab_size, model))
    for i in range(config.num_hidden_layers):
        table |= {f"layers.{i}.{name}": tensor for name, tensor in _layer_table(config, i).items()}
    return table | _spark_table(config)


def build_block_head(config: DFlashConfig, leaves: Mapping[Path, Any]) -> DFlashHead:
    """Build a head of its leaves, by their paths; `("target_ids",)` is one of them."""

    def part(kind: type, *path: str | int) -> dict[str, Any]:
        return {name: leaves.get((*path, name)) for name in kind.__dataclass_fields__}

    layers = []
    for i in range(config.num_hidden_layers):
        fields = part(DraftLayer, "layers", i)
        fields["attention"] = Attention(**part(Attention, "layers", i, "attention"))
        fields["mlp"] = GatedMlp(**part(GatedMlp, "layers", i, "mlp"))
        layers.append(DraftLayer(**fields))
    return DFlashHead(
        fc=leaves[("fc",)],
        hidden_norm=leaves[("hidden_norm",)],
        layers=tuple(layers),
        norm=leaves[("norm",)],
        lm_head=leaves.get(("lm_head",)),
        target_ids=leaves[("target_ids",)],
        embed=leaves.get(("embed",)),
        markov=MarkovBias(**part(MarkovBias, "markov")) if config.markov != "none" else None,
        confidence=ConfidenceHead(**part(ConfidenceHead, "confidence")) if config.confidence != "none" else None,
    )


def random_block_head(
    config: DFlashConfig, target: Decoder, target_ids: Int[Array, " draft_vocab"], key: Array
) -> DFlashHead:
    """Draw a head to start training from, float32. Output matrix and last norm are the target's, all else is random."""
    keys = iter(jax.random.split(key, 8 * config.num_hidden_layers + 8))
    leaves: dict[Path, Any] = {}
    for name, tensor in block_table(config).items():
        shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
        if len(shape) == 1:
            leaf = jnp.zeros(shape) if name.endswith("bias") else jnp.ones(shape)
        else:
            # What a layer adds to the residual stream is small at first.
            gain = 0.1 if tensor.path[-1] in ("o", "down") else 1.0
            leaf = jax.random.normal(next(keys), shape, jnp.float32) * gain * tensor.shape[-1] ** -0.5
        leaves[tensor.path] = leaf
    unembedding = target.embed if target.lm_head is None else target.lm_head
    leaves[("lm_head",)] = unembedding[target_ids].astype(jnp.float32)
    leaves[("norm",)] = norm_weight(target.norm).astype(jnp.float32)
    return build_block_head(config, leaves | {("target_ids",): target_ids})


def _layer_table(config: DFlashConfig, layer: int) -> dict[str, Tensor]:
    """List the tensors of a layer."""
    model, at, biases = config.hidden_size, ("layers", layer), config.attention_bias
    norms = {
        "input_layernorm.weight": Tensor((*at, "input_norm"), (model,)),
        "post_attention_layernorm.weight": Tensor((*at, "post_attention_norm"), (model,)),
    }
    attention = attention_table(
        config,
        (*at, "attention"),
        heads=config.num_attention_heads,
        model=model,
        inputs=model,
        qkv_bias=biases,
        o_bias=biases,
    )
    return norms | mlp_table("mlp.", (*at, "mlp"), model, config.intermediate_size) | attention


def _spark_table(config: DFlashConfig) -> dict[str, Tensor]:
    """List the tensors of the parts that DSpark adds."""
    model, rank, table = config.hidden_size, config.markov_rank, {}
    if config.markov != "none":
        table["markov_head.markov_w1.weight"] = Tensor(("markov", "previous"), (config.vocab_size, rank))
        table["markov_head.markov_w2.weight"] = Tensor(("markov", "following"), (config.draft_vocab_size, rank))
    if config.markov in ("gated", "rnn"):
        gated = config.markov == "gated"
        outputs, inputs = (rank, model + rank) if gated else (3 * rank, model + 2 * rank)
        name = f"markov_head.{'gate' if gated else 'joint'}_proj"
        table[f"{name}.weight"] = Tensor(("markov", "mixer"), (outputs, inputs), transpose=True)
        table[f"{name}.bias"] = Tensor(("markov", "mixer_bias"), (outputs,))
    if config.confidence != "none":
        width = model + (rank if config.confidence == "hidden and markov" else 0)
        table["confidence_head.proj.weight"] = Tensor(("confidence", "weight"), (1, width))
        table["confidence_head.proj.bias"] = Tensor(("confidence", "bias"), (1,))
    return table
