"""What each layer's router and experts saw: the state after attention, normed; and nothing that costs anything."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from driver import build, fast_jit, positions_of, random_tensors

import moespec_jax.nn.decoder
from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, ForwardInfo, forward
from moespec_jax.nn.moe import sparse_mlp

CONFIG = DecoderConfig(
    model_type="qwen2_moe",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=20,
    moe_intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    sparse_layers=(True, False, True, True),
    sliding_windows=(0, 0, 0, 0),
    qkv_bias=True,
    shared_expert_intermediate_size=8,
)
TENSORS = random_tensors(CONFIG, seed=1)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)).astype(np.int32)
both_backends = pytest.mark.parametrize("backend", [BACKENDS["switch"], BACKENDS["slots"]], ids=lambda b: b.name)


def whole(backend: Backend) -> Any:
    """One pass over all tokens: hidden states, and intermediate results with the state entering every layer."""
    batch, length = IDS.shape
    boundaries = tuple(range(CONFIG.num_hidden_layers + 1))

    def run(params: Decoder) -> tuple[Any, ForwardInfo]:
        cache = empty_cache(CONFIG, batch, length, jnp.float32, stacked=backend.stacked)
        positions = positions_of(IDS)
        mask, tokens = causal_mask(positions, length), jnp.asarray(IDS, jnp.int32)
        hidden, _, info = forward(CONFIG, params, tokens, positions, mask, cache, backend, boundaries=boundaries)
        return hidden, info

    return run


def block_output(layer: int, x: np.ndarray) -> np.ndarray:
    """What the feed-forward block of a sparse layer adds to the state, from published tensors."""

    def matrix(name: str) -> np.ndarray:
        return np.asarray(TENSORS[f"model.layers.{layer}.mlp.{name}.weight"], np.float64).T

    def matrices(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return matrix(f"{name}.gate_proj"), matrix(f"{name}.up_proj"), matrix(f"{name}.down_proj")

    logits = x @ matrix("gate")
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=-1)[:, : CONFIG.num_experts_per_tok]
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    if CONFIG.norm_topk_prob:
        weights /= weights.sum(-1, keepdims=True)
    routed = [matrices(f"experts.{e}") for e in range(CONFIG.num_experts)]
    shared = oracles.gated_mlp(x, *matrices("shared_expert"), CONFIG.hidden_act)
    gate = 1 / (1 + np.exp(-(x @ matrix("shared_expert_gate"))))
    return oracles.experts(x, routed, chosen, weights, CONFIG.hidden_act) + gate * shared


@both_backends
def test_inputs_are_the_normed_state_that_the_block_was_added_to(backend: Backend) -> None:
    """The state leaving a layer, less what the block makes of its inputs, is the state after attention."""
    _, info = fast_jit(whole(backend))(build(CONFIG, TENSORS, backend))
    states = np.asarray(info.aux_hidden_states, np.float64).reshape(
        IDS.size, CONFIG.num_hidden_layers + 1, CONFIG.hidden_size
    )
    sparse = [layer for layer, is_sparse in enumerate(CONFIG.sparse_layers) if is_sparse]
    for layer, router in zip(sparse, info.routers, strict=True):
        inputs = np.asarray(router.inputs, np.float64)
        after_attention = states[:, layer + 1] - block_output(layer, inputs)
        norm = TENSORS[f"model.layers.{layer}.post_attention_layernorm.weight"]
        expected = oracles.rms_norm(after_attention, norm, CONFIG.rms_norm_eps)
        np.testing.assert_allclose(inputs, expected, atol=2e-5, err_msg=f"layer {layer}")  # float32 sums of about 5


@both_backends
def test_a_program_that_does_not_use_inputs_does_not_keep_them(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the memory and the instructions of one whose layers never gave them out."""

    def cost() -> tuple[int, float, int]:
        compiled = fast_jit(lambda params: whole(backend)(params)[0]).lower(build(CONFIG, TENSORS, backend)).compile()
        memory: Any = compiled.memory_analysis()
        analysis: Any = compiled.cost_analysis()
        return memory.temp_size_in_bytes, analysis["bytes accessed"], compiled.as_text().count(" = ")

    def without(*arguments: Any) -> Any:
        y, info = sparse_mlp(*arguments)
        return y, info._replace(inputs=None)

    given_out = cost()
    monkeypatch.setattr(moespec_jax.nn.layer_blocks, "sparse_mlp", without)
    assert cost() == given_out
