"""Brute-force references in NumPy float64 and plain Python: loops over tokens, heads and experts."""

import math
from collections.abc import Callable

import numpy as np

_erf = np.vectorize(math.erf)

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def gated_mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, activation: str) -> np.ndarray:
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    return (ACTIVATIONS[activation](x @ gate) * (x @ up)) @ down


def experts(
    x: np.ndarray,
    matrices: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    chosen: np.ndarray,
    weights: np.ndarray,
    activation: str,
) -> np.ndarray:
    """Each token through each of its experts, one at a time; an id of `len(matrices)` means none."""
    out = np.zeros(x.shape, np.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            if expert < len(matrices):
                out[token] += float(weight) * gated_mlp(x[token], *matrices[expert], activation)
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """q `[batch, tokens, heads, head]`; k, v `[batch, kv_heads, slots, head]`; rows that see nothing are left 0."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, tokens, heads, head = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(tokens):
            for h in range(heads):
                group = h // (heads // k.shape[1])
                seen = np.flatnonzero(mask[b, t])
                if seen.size:
                    scores = k[b, group, seen] @ q[b, t, h] / math.sqrt(head)
                    shares = np.exp(scores - scores.max())
                    out[b, t, h] = shares / shares.sum() @ v[b, group, seen]
    return out.reshape(batch, tokens, heads * head)


def rotate(x: np.ndarray, frequencies: np.ndarray, position: int) -> np.ndarray:
    """One head as complex numbers (first half + i * second half), turned by `position * frequencies`."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * np.asarray(frequencies, np.float64))
    return np.concatenate([z.real, z.imag], axis=-1)


def token_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> list[float]:
    """Probabilities after temperature, top-k (ties with the k-th stay), top-p (ties by index) and min-p, in plain
    Python."""
    scaled = [x / temperature for x in logits]
    if 0 < top_k < len(scaled):
        kth = sorted(scaled, reverse=True)[top_k - 1]
        scaled = [x if x >= kth else -math.inf for x in scaled]
    highest = max(scaled)
    masses = [math.exp(x - highest) for x in scaled]
    total = math.fsum(masses)
    kept, mass = set(), 0.0
    for i in sorted(range(len(scaled)), key=lambda i: (-scaled[i], i)):
        if mass >= top_p and top_p < 1:
            break
        kept.add(i)
        mass += masses[i] / total
    kept = {i for i in kept if masses[i] >= min_p * max(masses)}
    inside = math.fsum(masses[i] for i in kept)
    return [masses[i] / inside if i in kept else 0.0 for i in range(len(scaled))]
