"""Targets and heads of published shapes with random weights, whose routers prefer some experts to others.

Random routers spread the tokens of a tree over nearly all experts, trained ones do not: 31 tokens of OLMoE want 39 of
64 experts, 63 want 54, and the 32 heaviest hold 93 % of the routers' mass; 63 tokens of Qwen3-30B-A3B want about 80 of
128; Mixtral's want 7 or 8 of 8. So routing is *skewed*: a layer's experts are ranked at random, and a token's logit of
the expert of rank r is `SHARPNESS * (z - exponent * log r)` with z from a standard normal distribution, which is Zipf's
law with an exponent for each model. The log r is in the weights: every token's state has the same constant in its first
coordinate, large enough that no layer changes it by much, and that coordinate's weight in the router is the expert's
push. The states are those of tokens alone, nearly: attention and experts are random too and add little.

The skew gives as many distinct experts as trained models want, so that the bytes read are right. What is chosen means
nothing, nor does the text.
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
from moespec_jax.nn.decoder import Decoder, Layer
from moespec_jax.nn.eagle3 import DraftHead, DraftLayer
from moespec_jax.nn.moe import SparseMlp
from moespec_jax.runtime.model import Model

# How skewed routing is: fitted to the published figures above (tests/test_bench_random.py measures what comes of it).
EXPONENTS = {"OLMoE-1B-7B": 0.9, "Qwen3-30B-A3B": 0.67, "Mixtral-8x7B": 0.9, "toy": 0.8}
SHARPNESS = 1.5
# Standard deviation of the embedding, beside which what layers add is small, and the constant over its whole norm.
_STREAM, _CONSTANT = 10.0, 0.15
# Logits' standard deviation over the one at which a softmax over so many begins to have favourites.
_DECIDED = 1.2
_TOY = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, vocab_size=512,
    num_hidden_layers=3, num_experts=16, num_experts_per_tok=2,
)  # fmt: skip


def shapes_of(model: str, layers: int | None = None) -> tuple[DecoderConfig, DraftConfig]:
    """Target and head of a published pair, cut to its first `layers`, or of a toy with OLMoE's parts.

    Raises:
        RequestError: there are not so many layers.
    """
    published = "OLMoE-1B-7B" if model == "toy" else model
    fields: dict[str, Any] = dict(MODELS[published])
    changes: dict[str, Any] = {"norm_before_residual": True}  # or a tree's first feature drowns all of its tokens
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
    """Target and head; the routing of the target is skewed by `exponent`, 0 for not at all."""
    weights, ranks, head = jax.random.split(jax.random.key(0), 3)
    target = skewed(config, random_decoder(config, backend, weights, dtype), exponent, ranks)
    ids = jnp.arange(draft.draft_vocab_size, dtype=jnp.int32)
    parameters = jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype),
        decided(draft, random_head(draft, target, ids, head)),
    )
    return SpeculativeParams(target, parameters)


def random_model(model: str, layers: int | None, dtype: DTypeLike | None, backend: Backend | None = None) -> Model:
    """As `load` gives one, without a tokenizer."""
    config, draft = shapes_of(model, layers)
    backend = backend or default_backend()
    kind = jnp.dtype(dtype or default_dtype())
    pair = random_pair(config, draft, backend, kind, EXPONENTS[model])
    head = LoadedDraft(draft, pair.draft, (), "specforge", "random")
    return Model(config, pair.target, backend, kind, None, (), Path(f"random {model}"), head)


def check_memory(config: DecoderConfig, dtype: DTypeLike | None) -> None:
    """Refuse a shape whose weights alone are more than this device's memory, before any are made.

    Raises:
        RequestError: they are.
    """
    kind, device = jnp.dtype(dtype or default_dtype()), jax.devices()[0]
    needed = sum(leaf.size for leaf in jax.tree.leaves(abstract_decoder(config, default_backend(), kind)))
    needed *= kind.itemsize
    there = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if there is not None and needed > there:
        raise RequestError(
            f"expected weights of at most {there / 1e9:.0f} GB, the memory of this device; {config.num_hidden_layers}"
            f" layers take {needed / 1e9:.0f} GB in {kind}: see --layers and --dtype"
        )


def default_dtype() -> str:
    """Of weights that nobody asked for in another: as `load` has it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def skewed(config: DecoderConfig, target: Decoder, exponent: float, key: jax.Array) -> Decoder:
    """The same decoder with a constant in every state, and routers that prefer experts by it."""
    width = config.hidden_size
    embed = target.embed * jnp.asarray(_STREAM * width**0.5, target.embed.dtype)
    embed = embed.at[:, 0].set(_STREAM * width**0.5 * _CONSTANT)
    keys = jax.random.split(key, len(target.layers))
    layers = tuple(_skewed_layer(layer, exponent, k) for layer, k in zip(target.layers, keys, strict=True))
    return dataclasses.replace(target, embed=embed, layers=layers)


def decided(config: DraftConfig, head: DraftHead) -> DraftHead:
    """The same head with favourites that differ from token to token, so that its trees are deep and of many tokens, as
    a trained one's are: every position attends to itself, what it finds there outweighs the rest, and logits are spread
    so far that softmax has favourites."""
    groups, width = config.num_attention_heads // config.num_key_value_heads, config.head_dim

    def own(layer: DraftLayer) -> DraftLayer:
        keys = layer.attention.k.reshape(config.num_key_value_heads, 1, width, -1)
        queries = jnp.broadcast_to(keys, (keys.shape[0], groups, *keys.shape[2:])).reshape(layer.attention.q.shape)
        attention = dataclasses.replace(layer.attention, q=queries, o=layer.attention.o * 30)
        return dataclasses.replace(layer, attention=attention)

    spread = _DECIDED * math.sqrt(2 * math.log(config.draft_vocab_size))
    return dataclasses.replace(head, layers=tuple(map(own, head.layers)), lm_head=head.lm_head * spread)


def published_accept_length(tree: TreeConfig) -> float:
    """Tokens a round to simulate: 2.3 at 5 nodes and 3.7 at 60, as published for heads of these models, between and
    beyond by the logarithm of the size, and not more than the longest path."""
    length = 2.3 + 1.4 * math.log(tree.size / 5) / math.log(60 / 5)
    return round(min(max(length, 1.0), float(tree.longest_path)), 2)


def _skewed_layer(layer: Layer, exponent: float, key: jax.Array) -> Layer:
    """A layer, or a stack of them, whose router sees the constant after its norm."""
    if not isinstance(layer.mlp, SparseMlp):
        return layer
    router = layer.mlp.router
    constant = _CONSTANT / (1 + _CONSTANT**2) ** 0.5 * router.shape[-1] ** 0.5
    ranks = 1.0 + jnp.argsort(jax.random.uniform(key, router.shape[:-1]), axis=-1).astype(jnp.float32)
    push = -SHARPNESS * exponent * jnp.log(ranks) / constant
    rows = router * jnp.asarray(SHARPNESS * (1 + _CONSTANT**2) ** 0.5, router.dtype)
    return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, router=rows.at[..., 0].set(push)))
