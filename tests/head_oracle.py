"""A draft head in NumPy and float64, written from the published description (arXiv:2503.01840 and the formats'
variants), row by row and head by head; and random heads of every variant, in which nothing is zero or one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.config import DraftConfig
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.eagle3 import DraftHead

MODEL, VOCAB = 32, 48
BASE = DraftConfig(
    vocab_size=VOCAB,
    draft_vocab_size=20,
    hidden_size=MODEL,
    target_hidden_size=MODEL,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    boundaries=(0, 1, 2),
    max_position_embeddings=16,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "norm_before_residual": dict(norm_before_residual=True),
    "norm_before_fc": dict(norm_before_fc=True),
    "fc_norm": dict(fc_norm=True),
    "norm_output": dict(norm_output=True),
    "own_embedding": dict(target_hidden_size=40, own_embedding=True),
    "qk_norm": dict(qk_norm="head"),
    "full_vocabulary": dict(draft_vocab_size=VOCAB),
    "biases": dict(attention_bias=True, fc_bias=True),
    "two_layers": dict(num_hidden_layers=2),
    "several": dict(num_hidden_layers=2, fc_norm=True, norm_output=True, qk_norm="head", norm_before_residual=True),
}


def head_of(variant: str, seed: int = 0) -> tuple[DraftConfig, DraftHead, jax.Array]:
    """Settings, random parameters and the target's embedding `[vocab, target model]`."""
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    rng = np.random.default_rng(seed)

    def draw(*shape: int, gain: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * gain, jnp.float32)

    embedding = draw(VOCAB, config.target_hidden_size, gain=0.7)
    ids = jnp.asarray(np.sort(rng.permutation(VOCAB)[: config.draft_vocab_size]), jnp.int32)
    target = Decoder(draw(VOCAB, MODEL, gain=0.2), layers=(), experts=None, norm=draw(MODEL), lm_head=None)
    head = dataclasses.replace(random_head(config, target, ids, jax.random.key(seed)), target_ids=None)
    head = jax.tree.map(lambda x: x * 0.8 + draw(*x.shape, gain=0.1), head)
    if config.attention_bias:
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        biases = dict(q_bias=draw(q, gain=0.3), k_bias=draw(kv), v_bias=draw(kv), o_bias=draw(MODEL, gain=0.3))
        layers = [layer.replace(attention=layer.attention.replace(**biases)) for layer in head.layers]
        head = dataclasses.replace(head, layers=tuple(layers))
    own = draw(VOCAB, MODEL) if config.own_embedding else None
    bias = draw(MODEL, gain=0.3) if config.fc_bias else None
    return config, dataclasses.replace(head, target_ids=ids, embed=own, fc_bias=bias), embedding


def beside(head: DraftHead, embedding: jax.Array) -> SpeculativeParams[DraftHead]:
    """The head with as much of a target as it reads: the embedding."""
    return SpeculativeParams(Decoder(embedding, layers=(), experts=None, norm=embedding[0], lm_head=None), head)


def fuse(config: DraftConfig, head: Any, aux: np.ndarray) -> np.ndarray:
    """Features of auxiliary hidden states `[tokens, aux]`."""
    head = wide(head)
    if config.norm_before_fc:
        aux = norm(config, aux, head.fc_norms[0])
    if config.fc_norm:
        width = config.target_hidden_size
        parts = [aux[:, i * width : (i + 1) * width] for i in range(len(config.boundaries))]
        aux = np.concatenate([norm(config, x, w) for x, w in zip(parts, head.fc_norms, strict=True)], axis=1)
    return aux @ head.fc + (0.0 if head.fc_bias is None else head.fc_bias)


def outputs(config: DraftConfig, head: Any, features: np.ndarray, embedded: np.ndarray) -> np.ndarray:
    """The head's output at every pair of one sequence `[tokens, model]`; pair t stands at position t."""
    head = wide(head)
    x = np.asarray(features, np.float64)
    for number, layer in enumerate(head.layers):
        residual = x
        if number == 0:
            feature = norm(config, x, layer.hidden_norm)
            read = np.concatenate([norm(config, np.asarray(embedded, np.float64), layer.input_norm), feature], axis=1)
            residual = feature if config.norm_before_residual else x
        else:
            read = norm(config, x, layer.input_norm)
        x = residual + _attention(config, layer.attention, read)
        rows = norm(config, x, layer.post_attention_norm)
        gate = rows @ layer.mlp.gate
        x = x + (gate / (1 + np.exp(-gate)) * (rows @ layer.mlp.up)) @ layer.mlp.down
    return x


def handed_on(config: DraftConfig, head: Any, out: np.ndarray) -> np.ndarray:
    """What the next draft step takes for a feature."""
    return norm(config, out, wide(head).norm) if config.norm_output else out


def logits(config: DraftConfig, head: Any, out: np.ndarray) -> np.ndarray:
    """Over the draft vocabulary."""
    head = wide(head)
    return norm(config, out, head.norm) @ head.lm_head.T


def _attention(config: DraftConfig, weights: Any, read: np.ndarray) -> np.ndarray:
    tokens, size = len(read), config.head_dim
    q, k, v = (
        (read @ w.T + (0.0 if b is None else b)).reshape(tokens, -1, size)
        for w, b in ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias))
    )
    if config.qk_norm == "head":
        q, k = norm(config, q, weights.q_norm), norm(config, k, weights.k_norm)
    q, k = rotate(config, q), rotate(config, k)
    mixed = np.zeros_like(q)
    group = config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_attention_heads):
        for t in range(tokens):
            scores = k[: t + 1, head // group] @ q[t, head] / np.sqrt(size)
            weight = np.exp(scores - scores.max())
            mixed[t, head] = weight / weight.sum() @ v[: t + 1, head // group]
    out = mixed.reshape(tokens, -1) @ weights.o
    return out if weights.o_bias is None else out + weights.o_bias


def rotate(config: DraftConfig | DFlashConfig, x: np.ndarray) -> np.ndarray:
    half = config.head_dim // 2
    turn = np.exp(1j * np.arange(len(x))[:, None] * config.rope.rope_theta ** (-np.arange(half) / half)[None, :])
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def norm(config: DraftConfig | DFlashConfig, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def wide(head: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), head)
