"""Targets and heads of published shapes with random weights and skewed routing.

The tokens of a tree select nearly all experts of a random router, but fewer of a trained one: 31 tokens select 39 of
OLMoE's 64 experts and 63 tokens 54, and the 32 experts of largest mass hold 93 % of the router's mass; 63 tokens
select about 80 of Qwen3-30B-A3B's 128 experts; of Mixtral's 8 they select 7 or 8. Therefore routing is *skewed*: the
experts of a layer have random ranks, and the router's logit of the expert of rank r is

    SHARPNESS * (z - exponent * log r),    z ~ N(0, 1),

which is Zipf's law with an exponent for each model. The term in log r is a weight of the router: the first coordinate
of every hidden state is the same constant, large enough that layers hardly change it, and multiplies that weight. The
other coordinates depend almost only on the token, since attention and experts, also random, add little to the
embedding.

With this skew a tree reads about as many distinct experts as with a trained model, so that the bytes read are
realistic. Which experts are selected, and the text, are meaningless.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.head.read import LoadedDraft
from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.checkpoint.parameters import abstract_decoder, random_decoder
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decoding.speculative import SpeculativeParams
from moespec_jax.errors import RequestError
from moespec_jax.measure.published_shapes import MODELS, draft_config
from moespec_jax.nn.backend import Backend, default_backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead, DraftLayer
from moespec_jax.nn.layer_blocks import Layer
from moespec_jax.nn.moe import SparseMlp
from moespec_jax.runtime.model import Model

# Exponents of the skew, fitted to the published numbers above (tests/test_bench_random.py measures the result).
EXPONENTS = {"OLMoE-1B-7B": 0.9, "Qwen3-30B-A3B": 0.67, "Mixtral-8x7B": 0.9, "toy": 0.8}
SHARPNESS = 1.5
# Standard deviation of the embedding, large against the output of layers; and the constant as a fraction of its norm.
_STREAM, _CONSTANT = 10.0, 0.15
# Standard deviation of the head's logits, over the value above which few tokens dominate a softmax: sqrt(2 log n).
_LOGIT_SPREAD = 1.2
_TOY = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, vocab_size=512,
    num_hidden_layers=3, num_experts=16, num_experts_per_tok=2,
)  # fmt: skip


def shapes_of(model: str, layers: int | None = None) -> tuple[DecoderConfig, DraftConfig]:
    """Configure target and head of a published shape, or of "toy", a small OLMoE; `layers` reduces its layers.

    Raises:
        RequestError: `layers` is out of range.
    """
    published = "OLMoE-1B-7B" if model == "toy" else model
    fields: dict[str, Any] = dict(MODELS[published])
    changes: dict[str, Any] = {
        "norm_before_residual": True
    }  # otherwise the root's feature outweighs the embeddings of all nodes
    if model == "toy":
        fields |= _TOY
        changes |= dict(draft_vocab_size=256, intermediate_size=96, boundaries=(0, 1, 2))
    if layers is not None:
        if not 1 <= layers <= fields["num_hidden_layers"]:
            raise RequestError(f"expected --layers from 1 to {model}'s {fields['num_hidden_layers']}; got {layers}")
        fields["num_hidden_layers"], changes["boundaries"] = layers, (0, layers // 2, layers)
    config = read_config(fields)
    return config, draft_config(published, config, **changes)


def random_pair(
    config: DecoderConfig, draft: DraftConfig, backend: Backend, dtype: DTypeLike, exponent: float
) -> SpeculativeParams:
    """Make the parameters of target and head; the target's routing is skewed by `exponent`, 0 for none."""
    weights, ranks, head = jax.random.split(jax.random.key(0), 3)
    target = skewed(config, random_decoder(config, backend, weights, dtype), exponent, ranks)
    ids = jnp.arange(draft.draft_vocab_size, dtype=jnp.int32)
    parameters = jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype),
        sharpened(draft, random_head(draft, target, ids, head)),
    )
    return SpeculativeParams(target, parameters)


def random_model(model: str, layers: int | None, dtype: DTypeLike | None, backend: Backend | None = None) -> Model:
    """Make a model with random weights and a draft head, without a tokenizer; otherwise as `load` does."""
    config, draft = shapes_of(model, layers)
    backend = backend or default_backend()
    kind = jnp.dtype(dtype or default_dtype())
    pair = random_pair(config, draft, backend, kind, EXPONENTS[model])
    head = LoadedDraft(draft, pair.draft, (), "specforge", "random")
    return Model(config, pair.target, backend, kind, None, (), Path(f"random {model}"), head)


def check_memory(config: DecoderConfig, dtype: DTypeLike | None) -> None:
    """Check that the weights of a shape fit this device's memory, before they are made.

    Raises:
        RequestError: they do not fit.
    """
    kind, device = jnp.dtype(dtype or default_dtype()), jax.devices()[0]
    needed = sum(leaf.size for leaf in jax.tree.leaves(abstract_decoder(config, default_backend(), kind)))
    needed *= kind.itemsize
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory is not None and needed > memory:
        raise RequestError(
            f"expected weights of at most {memory / 1e9:.0f} GB, the memory of this device; {config.num_hidden_layers}"
            f" layers take {needed / 1e9:.0f} GB in {kind}: see --layers and --dtype"
        )


def default_dtype() -> str:
    """Default dtype of random weights, as in `load`."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def skewed(config: DecoderConfig, target: Decoder, exponent: float, key: jax.Array) -> Decoder:
    """Skew the routing of a decoder: a constant first coordinate in every embedding, and router weights for it."""
    width = config.hidden_size
    embed = target.embed * jnp.asarray(_STREAM * width**0.5, target.embed.dtype)
    embed = embed.at[:, 0].set(jnp.asarray(_STREAM * width**0.5 * _CONSTANT, embed.dtype))
    keys = jax.random.split(key, len(target.layers))
    layers = tuple(_skewed_layer(layer, exponent, k) for layer, k in zip(target.layers, keys, strict=True))
    return dataclasses.replace(target, embed=embed, layers=layers)


def sharpened(config: DraftConfig, head: DraftHead) -> DraftHead:
    """Sharpen a head's distributions, so that its trees are as deep and as varied as those of a trained head.

    Every position attends to itself (queries equal keys), the output of attention is scaled up against the rest, and
    the logits are scaled so that few tokens dominate the softmax.
    """
    groups, width = config.num_attention_heads // config.num_key_value_heads, config.head_dim

    def own(layer: DraftLayer) -> DraftLayer:
        keys = layer.attention.k.reshape(config.num_key_value_heads, 1, width, -1)
        queries = jnp.broadcast_to(keys, (keys.shape[0], groups, *keys.shape[2:])).reshape(layer.attention.q.shape)
        attention = dataclasses.replace(layer.attention, q=queries, o=layer.attention.o * 30)
        return dataclasses.replace(layer, attention=attention)

    spread = _LOGIT_SPREAD * math.sqrt(2 * math.log(config.draft_vocab_size))
    assert head.lm_head is not None
    return dataclasses.replace(head, layers=tuple(map(own, head.layers)), lm_head=head.lm_head * spread)


def published_accept_length(tree: TreeConfig) -> float:
    """Compute the accept length to simulate for a tree, from values published for heads of these models.

    It is 2.3 for 5 tokens and 3.7 for 60, linear in the logarithm of the size, from 1 to the longest path.
    """
    length = 2.3 + 1.4 * math.log(tree.size / 5) / math.log(60 / 5)
    return round(min(max(length, 1.0), float(tree.longest_path)), 2)


def _skewed_layer(layer: Layer, exponent: float, key: jax.Array) -> Layer:
    """Skew the router of a layer, or of a stack of layers, which reads the constant after its RMS norm."""
    if not isinstance(layer.mlp, SparseMlp):
        return layer
    router = layer.mlp.router
    constant = _CONSTANT / (1 + _CONSTANT**2) ** 0.5 * router.shape[-1] ** 0.5
    ranks = 1.0 + jnp.argsort(jax.random.uniform(key, router.shape[:-1]), axis=-1).astype(jnp.float32)
    skew = -SHARPNESS * exponent * jnp.log(ranks) / constant
    rows = router * jnp.asarray(SHARPNESS * (1 + _CONSTANT**2) ** 0.5, router.dtype)
    rows = rows.at[..., 0].set(skew.astype(rows.dtype))
    return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, router=rows))
