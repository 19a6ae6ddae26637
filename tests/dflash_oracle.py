"""A DFlash head in NumPy and float64, written from the published description, row by row and head by head; and random
heads of every variant, in which nothing is zero or one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from head_oracle import norm, rotate, wide

from moespec_jax.config import DecoderConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.nn.attention import Attention
from moespec_jax.nn.dflash import ConfidenceHead, DFlashHead, MarkovBias
from moespec_jax.nn.eagle3 import DraftLayer
from moespec_jax.nn.layers import GatedMlp

MODEL, VOCAB, BLOCK = 32, 48, 5
BASE = DFlashConfig(
    vocab_size=VOCAB,
    draft_vocab_size=20,
    hidden_size=MODEL,
    target_hidden_size=MODEL,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    boundaries=(0, 1, 2),
    block_size=BLOCK,
    mask_token_id=47,
    sliding_windows=(0, 0),
    causal=(False, False),
    max_position_embeddings=16,
)
DSPARK: dict[str, Any] = dict(sample_from_anchor=True, markov_rank=6, confidence="hidden and markov")
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "one tap": dict(boundaries=(1,)),
    "own embedding": dict(own_embedding=True, target_hidden_size=40),
    "full vocabulary": dict(draft_vocab_size=VOCAB),
    "biases": dict(attention_bias=True),
    "windows": dict(sliding_windows=(3, 0, 9), causal=(True, False, False)),
    "windows of each row": dict(sliding_windows=(3, 0, 9), causal=(True, False, False), anchored_windows=False),
    "vanilla": DSPARK | dict(markov="vanilla"),
    "gated": DSPARK | dict(markov="gated", confidence="hidden"),
    "rnn": DSPARK | dict(markov="rnn", confidence="none", sample_from_anchor=False),
    "confidence alone": dict(sample_from_anchor=True, confidence="hidden"),
}


def head_of(config: DFlashConfig, seed: int = 0, gain: float = 1.0) -> DFlashHead:
    """Random parameters of float32; `gain` scales what layers add to the residual stream."""
    rng = np.random.default_rng(seed)
    d, f, rank = config.hidden_size, config.intermediate_size, config.markov_rank
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def draw(*shape: int, size: float | None = None) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * (shape[-1] ** -0.5 if size is None else size), jnp.float32)

    def norm(width: int) -> jax.Array:
        return 1.0 + draw(width, size=0.2)

    def layer() -> DraftLayer:
        biases = {}
        if config.attention_bias:
            biases = dict(q_bias=draw(q), k_bias=draw(kv, size=0.5), v_bias=draw(kv, size=0.5), o_bias=draw(d))
        head = config.head_dim
        attention = Attention(
            draw(q, d), draw(kv, d), draw(kv, d), draw(q, d, size=gain * q**-0.5),
            q_norm=norm(head), k_norm=norm(head), **biases,
        )  # fmt: skip
        mlp = GatedMlp(draw(d, f, size=d**-0.5), draw(d, f, size=d**-0.5), draw(f, d, size=gain * f**-0.5))
        return DraftLayer(norm(d), None, attention, norm(d), mlp)

    inputs, outputs = {"gated": (d + rank, rank), "rnn": (d + 2 * rank, 3 * rank)}.get(config.markov, (0, 0))
    markov = None
    if config.markov != "none":
        mixer = (draw(inputs, outputs, size=inputs**-0.5), draw(outputs, size=0.3)) if inputs else (None, None)
        markov = MarkovBias(draw(config.vocab_size, rank, size=1.0), draw(config.draft_vocab_size, rank), *mixer)
    width = {"none": 0, "hidden": d, "hidden and markov": d + rank}[config.confidence]
    ids = np.sort(rng.permutation(config.vocab_size)[: config.draft_vocab_size])
    return DFlashHead(
        fc=draw(config.aux_size, d, size=config.aux_size**-0.5),
        hidden_norm=norm(d),
        layers=tuple(layer() for _ in range(config.num_hidden_layers)),
        norm=norm(d),
        lm_head=draw(config.draft_vocab_size, d, size=2 * d**-0.5),
        target_ids=jnp.asarray(ids, jnp.int32),
        embed=draw(config.vocab_size, d, size=1.0) if config.own_embedding else None,
        markov=markov,
        confidence=ConfidenceHead(draw(1, width), jnp.full((1,), 0.4)) if width else None,
    )


def config_for(target: DecoderConfig, **changes: Any) -> DFlashConfig:
    """A small head of the target's width over three of its states."""
    fields: dict[str, Any] = dict(
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size - 4,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        boundaries=(0, 1, target.num_hidden_layers),
        mask_token_id=target.vocab_size - 1,
    )
    return dataclasses.replace(BASE, **(fields | changes))


def features(config: DFlashConfig, head: Any, aux: np.ndarray) -> np.ndarray:
    """Features of auxiliary hidden states `[tokens, aux]`."""
    head = wide(head)
    return norm(config, aux @ head.fc, head.hidden_norm)


def block(config: DFlashConfig, head: Any, context: np.ndarray, embedded: np.ndarray) -> np.ndarray:
    """Outputs of a block `[block, model]` that follows the features of all tokens before it."""
    head, x = wide(head), np.asarray(embedded, np.float64)
    for layer, window, causal in zip(head.layers, config.sliding_windows, config.causal, strict=True):
        read = norm(config, x, layer.input_norm)
        x = x + _attention(config, layer.attention, np.concatenate([context, read]), len(context), window, causal)
        rows = norm(config, x, layer.post_attention_norm)
        gate = rows @ layer.mlp.gate
        x = x + (gate / (1 + np.exp(-gate)) * (rows @ layer.mlp.up)) @ layer.mlp.down
    return norm(config, x, head.norm)


def chain(
    config: DFlashConfig, head: Any, hidden: np.ndarray, root: int, noise: np.ndarray | None = None, scale: float = 1.0
) -> tuple[list[int], list[float]]:
    """Tokens drafted from the outputs of a block, and the log-probabilities of their paths; `noise` `[drafted, vocab]`
    is added to the logits times `scale`."""
    head, before, state = wide(head), root, np.zeros(config.markov_rank)
    ids = np.asarray(head.target_ids).astype(int)
    tokens: list[int] = []
    scores: list[float] = []
    for number, row in enumerate(hidden if config.sample_from_anchor else hidden[1:]):
        logits, state = next_logits(config, head, row, before, state)
        logits = logits * scale + (0.0 if noise is None else noise[number, ids])
        best = int(np.argmax(logits))
        gain = logits[best] - np.log(np.exp(logits).sum())
        if config.confidence != "none":
            gain = np.log(confidence(config, head, row, before))
        before = int(ids[best])
        tokens.append(before)
        scores.append((scores[-1] if scores else 0.0) + float(gain))
    return tokens, scores


def next_logits(
    config: DFlashConfig, head: Any, row: np.ndarray, before: int, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the token that a row drafts after the token `before`, and the next recurrent state."""
    head, logits = wide(head), np.asarray(head.lm_head, np.float64) @ row
    if config.markov == "none":
        return logits, state
    previous = head.markov.previous[before]
    mixed = previous
    if config.markov == "gated":
        mixed = previous * _sigmoid(np.concatenate([row, previous]) @ head.markov.mixer + head.markov.mixer_bias)
    if config.markov == "rnn":
        z = np.concatenate([state, previous, row]) @ head.markov.mixer + head.markov.mixer_bias
        gate, candidate, output = z.reshape(3, -1)
        state = _sigmoid(gate) * state + (1 - _sigmoid(gate)) * np.tanh(candidate)
        mixed = np.tanh(output)
    return logits + head.markov.following @ mixed, state


def confidence(config: DFlashConfig, head: Any, row: np.ndarray, before: int) -> float:
    """Estimated probability that the token that a row drafts after `before` is accepted."""
    head = wide(head)
    read = np.concatenate([row, head.markov.previous[before]]) if "markov" in config.confidence else row
    return float(_sigmoid(read @ head.confidence.weight[0] + head.confidence.bias[0]))


def _attention(
    config: DFlashConfig, weights: Any, read: np.ndarray, root: int, window: int, causal: bool
) -> np.ndarray:
    """Attention of the rows from position `root` on to all rows; row p stands at position p."""
    size = config.head_dim
    q, k, v = (
        (read @ w.T + (0.0 if b is None else b)).reshape(len(read), -1, size)
        for w, b in ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias))
    )
    q, k = rotate(config, norm(config, q, weights.q_norm)), rotate(config, norm(config, k, weights.k_norm))
    mixed, group = [], config.num_attention_heads // config.num_key_value_heads
    for p in range(root, len(read)):
        seen = [s for s in range(len(read)) if _attends(config, p, s, root, window, causal)]
        parts = []
        for head in range(config.num_attention_heads):
            scores = k[seen, head // group] @ q[p, head] / np.sqrt(size)
            weight = np.exp(scores - scores.max())
            parts.append(weight / weight.sum() @ v[seen, head // group])
        mixed.append(np.concatenate(parts))
    out = np.array(mixed) @ weights.o
    return out if weights.o_bias is None else out + weights.o_bias


def _attends(config: DFlashConfig, p: int, s: int, root: int, window: int, causal: bool) -> bool:
    if causal and s > p:
        return False
    if window and config.anchored_windows:
        return s >= root - window
    return not window or abs(p - s) < window


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))
