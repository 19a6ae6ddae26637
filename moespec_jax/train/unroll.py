"""Head unrolled over its own outputs, as in decoding (EAGLE-3's training-time test, arXiv:2503.01840, section 3.2).

Step j reads at index t: the embedding of the true token t + 1 + j, and as feature the target's (j = 0) or the head's
own output at the same index in step j - 1. It predicts token t + 2 + j. Its query attends to the keys that it has when
drafting after a true prefix that ends at t: those of step 0 up to t, and of each later step the key at index t alone.
So attention costs T^2 + j T instead of (j T)^2:

    step 0, keys     step 1    step 2
    x . . .          x . . .   x . . .
    x x . .          . x . .   . x . .
    x x x .          . . x .   . . x .
    x x x x          . . . x   . . . x
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import DraftConfig
from moespec_jax.nn.attention import project_qkv
from moespec_jax.nn.eagle3 import DraftHead, draft_logits, finish_layer, fuse_aux, layer_input, next_features
from moespec_jax.nn.layers import rope_angles

# Keys and values `[batch, tokens, kv_heads, head]` of each layer, of all steps before.
_Keys = tuple[tuple[tuple[Array, Array], ...], ...]
T = TypeVar("T")
# (step, logits [batch, tokens, draft_vocab]) -> result of the step.
Score = Callable[[int, Array], T]


def unroll(
    config: DraftConfig,
    head: DraftHead,
    embed: Float[Array, "vocab model"],
    aux: Float[Array, "batch tokens aux"],
    tokens: Int[Array, "batch tokens"],
    steps: int,
    score: Score[T],
    recompute: bool = False,
) -> list[T]:
    """Apply `score` to the logits of each step. With `recompute` the backward pass computes each step again, so that
    only one step's logits are in memory at a time.

    Index t of step j is valid only if token t + 1 + j is among `tokens`; past the end, token 0 is used.
    """
    embed = embed if head.embed is None else head.embed
    features, keys, results = fuse_aux(config, head, aux), ((),) * config.num_hidden_layers, []
    run = jax.checkpoint(_step, static_argnums=(0, 5, 6)) if recompute else _step
    for step in range(steps):
        ahead = jnp.pad(tokens[:, 1 + step :], ((0, 0), (0, min(1 + step, tokens.shape[1]))))
        features, keys, result = run(config, head, embed[ahead], features, keys, step, score)
        results.append(result)
    return results


def _step(
    config: DraftConfig, head: DraftHead, embedded: Array, x: Array, keys: _Keys, step: int, score: Score[T]
) -> tuple[Array, _Keys, T]:
    """Run one draft step; returns the features and keys for the next one, and the result of the step."""
    batch, tokens = x.shape[:2]
    positions = jnp.broadcast_to(step + jnp.arange(tokens, dtype=jnp.int32)[None, :], (batch, tokens))
    longest = jnp.int32(tokens + step)
    cos, sin = rope_angles(config.rope, config.head_dim, config.max_position_embeddings, positions, longest)
    grown = []
    for layer, before in zip(head.layers, keys, strict=True):
        h, x = layer_input(config, layer, embedded, x)
        q, k, v = project_qkv(config, layer.attention, h, cos, sin)
        grown.append((*before, (k, v)))
        x = finish_layer(config, layer, x, attend_chain(q, grown[-1]))
    return next_features(config, head, x), tuple(grown), score(step, draft_logits(config, head, x))


def attend_chain(
    q: Float[Array, "batch tokens heads head"], keys: tuple[tuple[Array, Array], ...]
) -> Float[Array, "batch tokens q_out"]:
    """Attend to the first step's keys up to the same index, and to later steps' keys at the same index."""
    batch, tokens, heads, head = q.shape
    first_k, first_v = keys[0]
    grouped = q.reshape(batch, tokens, first_k.shape[2], -1, head)
    causal = jnp.einsum("btgqh,bsgh->bgqts", grouped, first_k, preferred_element_type=jnp.float32) * head**-0.5
    visible = jnp.tril(jnp.ones((tokens, tokens), bool))
    scores = [jnp.where(visible[None, None, None], causal, jnp.finfo(jnp.float32).min)]
    for k, _ in keys[1:]:
        own = jnp.einsum("btgqh,btgh->bgqt", grouped, k, preferred_element_type=jnp.float32) * head**-0.5
        scores.append(own[..., None])
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(first_v.dtype)
    mixed = jnp.einsum("bgqts,bsgh->btgqh", weights[..., :tokens], first_v)
    for i, (_, v) in enumerate(keys[1:]):
        mixed = mixed + jnp.einsum("bgqt,btgh->btgqh", weights[..., tokens + i], v)
    return mixed.reshape(batch, tokens, heads * head)
