"""A decoder in NumPy and float64 that keeps a cache and applies an expert budget literally: token by token, head by
head, expert by expert. Full attention, no biases, no shared expert."""

from collections.abc import Sequence
from typing import Any

import budget_oracle
import jax
import numpy as np
import oracles

from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.budget_config import BudgetConfig


class SlowDecoder:
    """One sequence of a model whose parameters are in the per-expert layout."""

    def __init__(self, config: DecoderConfig, params: Any):
        self.config = config
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.cache: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(config.num_hidden_layers)]

    def read(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        budget: BudgetConfig | None = None,
        rows: budget_oracle.Rows | None = None,
    ) -> tuple[np.ndarray, list[list[tuple[np.ndarray, np.ndarray]]]]:
        """Logits of a tree of tokens behind the cache, and the rows of keys and values that each would leave there."""
        config, params, known = self.config, self.params, len(self.cache[0])
        paths = [path_to(parents, node) for node in range(len(tokens))]
        x = params.embed[list(tokens)]
        left: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for i, layer in enumerate(params.layers):
            h = oracles.rms_norm(x, layer.input_norm, config.rms_norm_eps)
            own = [self.project(layer.attention, h[n], known + len(paths[n]) - 1) for n in range(len(tokens))]
            left.append([(k, v) for _, k, v in own])
            for n, (q, _, _) in enumerate(own):
                seen = self.cache[i] + [left[i][a] for a in paths[n]]
                x[n] = x[n] + attend(q, seen) @ layer.attention.o
            h = oracles.rms_norm(x, layer.post_attention_norm, config.rms_norm_eps)
            x = x + self.experts(i, layer.mlp.router, h, budget, rows)
        head = params.embed if params.lm_head is None else params.lm_head
        return oracles.rms_norm(x, params.norm, config.rms_norm_eps) @ head.T, left

    def project(self, weights: Any, h: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value of one token, `[heads, head]`."""
        config, parts = self.config, []
        half = config.head_dim // 2
        frequencies = config.rope.rope_theta ** (-np.arange(half) / half)
        for matrix, norm in ((weights.q, weights.q_norm), (weights.k, weights.k_norm), (weights.v, None)):
            y = matrix @ h
            if norm is not None and config.qk_norm == "flat":
                y = oracles.rms_norm(y, norm, config.rms_norm_eps)
            if config.clip_qkv is not None:
                y = np.clip(y, -config.clip_qkv, config.clip_qkv)
            y = y.reshape(-1, config.head_dim)
            if norm is not None and config.qk_norm == "head":
                y = oracles.rms_norm(y, norm, config.rms_norm_eps)
            parts.append(y)
        return (
            oracles.rotate(parts[0], frequencies, position),
            oracles.rotate(parts[1], frequencies, position),
            parts[2],
        )

    def experts(
        self,
        layer: int,
        router: np.ndarray,
        h: np.ndarray,
        budget: BudgetConfig | None,
        rows: budget_oracle.Rows | None,
    ) -> np.ndarray:
        """Every token through the experts it may go to."""
        config, logits = self.config, h @ router.T
        if budget is None or rows is None:
            budget, bound = BudgetConfig(config.num_experts), config.num_experts
            rows = plain_rows(len(h))
        else:
            assert isinstance(budget.experts, tuple)
            bound = int(budget.experts[layer])
        outcome = budget_oracle.restrict(budget, bound, logits, config.num_experts_per_tok, config.norm_topk_prob, rows)
        out = np.zeros_like(h)
        for t, weights in enumerate(outcome.weights):
            for e, weight in weights.items():
                expert = self.params.experts[layer][e]
                out[t] += weight * oracles.gated_mlp(h[t], expert.gate, expert.up, expert.down, config.hidden_act)
        return out

    def keep(self, left: list[list[tuple[np.ndarray, np.ndarray]]], nodes: Sequence[int]) -> None:
        """Commit nodes, in order."""
        for cache, rows in zip(self.cache, left, strict=True):
            cache += [rows[n] for n in nodes]


def attend(q: np.ndarray, seen: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """One token's heads over the keys and values it sees."""
    keys, values = (np.stack(side) for side in zip(*seen, strict=True))
    mask = np.ones((1, 1, len(seen)), bool)
    return oracles.attend(q[None, None], keys.swapaxes(0, 1)[None], values.swapaxes(0, 1)[None], mask)[0, 0]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Nodes from the root to `node`."""
    return [*path_to(parents, parents[node]), node] if node > 0 else [0]


def chain(length: int) -> list[int]:
    """Parents of a text."""
    return list(range(-1, length - 1))


def plain_rows(count: int) -> budget_oracle.Rows:
    return tree_rows(chain(count), [0.0] * count)


def tree_rows(parents: Sequence[int], scores: Sequence[float]) -> budget_oracle.Rows:
    """One tree as the budget's oracle takes it."""
    paths = [path_to(parents, n) for n in range(len(parents))]
    depth = [len(path) - 1 for path in paths]
    return budget_oracle.Rows(
        valid=[True] * len(parents),
        chance=np.exp(scores).tolist(),
        depth=depth,
        ancestors=paths,
        peers=[depth.count(d) for d in depth],
        committed=[1.0] * len(parents),
    )
