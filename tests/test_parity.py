"""Logits and greedy tokens against transformers, live, over random configurations of every family."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import cached_logits, continue_greedily, fast_jit, positions_of
from flat_experts import flat_from_per_expert
from hf_models import CONTEXT, FAMILIES, TOKENS, Fields, draw_fields, hf_greedy, hf_logits, write_checkpoint

from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.decoder import Decoder, forward, unembed
from moespec_jax.nn.experts.dense import dense_experts

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

DRAWS = 40
TOLERANCE = 5e-5  # on logits of standard deviation 1; the largest difference seen is 1e-5


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers announces its progress and comments on settings drawn to be odd; one thread suits tiny shapes."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def reference_logits(config: DecoderConfig, params: Decoder, ids: Any) -> jax.Array:
    """Unless jitted, op by op; without a cache, every expert on every token: nothing is compiled per configuration."""
    if config.num_sparse_layers:
        params = params.replace(experts=flat_from_per_expert(params.experts))
    positions = positions_of(ids)
    mask = causal_mask(positions, ids.shape[1])
    backend = Backend("dense", "flat", False, dense_experts)
    hidden, _, _ = forward(config, params, jnp.asarray(ids, jnp.int32), positions, mask, None, backend)
    return unembed(params, hidden)


def random_ids(number: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 64, (batch, TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_cover_every_setting(family: str) -> None:
    drawn = [draw_fields(family, number) for number in range(DRAWS)]
    assert all(fields["max_position_embeddings"] == CONTEXT < TOKENS for fields in drawn)
    ropes = [f.get("rope_parameters") or {"rope_theta": 0} | (f["rope_scaling"] or {"type": "default"}) for f in drawn]
    kinds = [(r.get("rope_type") or r["type"], "rope_parameters" in f) for r, f in zip(ropes, drawn, strict=True)]
    assert len(set(kinds)) == 10
    both = ["tie_word_embeddings"]
    both += ["norm_topk_prob"] * (family != "mixtral") + ["attention_bias"] * (family in ("olmoe", "qwen3_moe"))
    both += ["use_sliding_window"] * family.startswith("qwen") + ["qkv_bias"] * (family == "qwen2_moe")
    for name in both:
        assert {fields[name] for fields in drawn} == {True, False}, name
    several = ["num_key_value_heads", "num_experts_per_tok", "hidden_act"]
    several += {"olmoe": ["clip_qkv"], "mixtral": ["sliding_window", "head_dim"]}.get(
        family, ["head_dim", "decoder_sparse_step", "max_window_layers", "sliding_window"]
    )
    for name in several:
        assert len({fields[name] for fields in drawn}) > 1, name
    if family.startswith("qwen"):
        assert {tuple(fields["mlp_only_layers"]) for fields in drawn} == {(), (0,), (1,)}
    if family == "qwen2_moe":
        assert sum("layer_types" in fields for fields in drawn) > 3


@pytest.mark.slow_except(*(f"{family}-{number}" for family in FAMILIES for number in range(6)))
@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, number: int, tmp_path: Path) -> None:
    fields = draw_fields(family, number)
    model = write_checkpoint(tmp_path, fields, seed=number)
    config = load_config(tmp_path)
    params = load_parameters(tmp_path, config, BACKENDS["switch"], jnp.float32)
    expected = hf_logits(model, random_ids(number))
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(reference_logits(config, params, random_ids(number)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow_except(*(f"{family}-{number}" for family in FAMILIES for number in range(2)))
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_back_ends(family: str, number: int, tmp_path: Path) -> None:
    """The compiled path with a cache; one configuration for each rotary scaling, back-ends in turn."""
    backend = BACKENDS["slots" if (number + FAMILIES.index(family)) % 2 else "switch"]
    model = write_checkpoint(tmp_path, draw_fields(family, number), seed=100 + number)
    config = load_config(tmp_path)
    params = load_parameters(tmp_path, config, backend, jnp.float32)
    ids = random_ids(number)
    np.testing.assert_allclose(
        cached_logits(config, params, backend, ids), hf_logits(model, ids), atol=TOLERANCE, rtol=0
    )


GREEDY: dict[str, Fields] = {
    "olmoe": dict(clip_qkv=1.0),
    "qwen3_moe": dict(use_sliding_window=True, sliding_window=11, mlp_only_layers=[], decoder_sparse_step=1),
    "mixtral": dict(sliding_window=9),
    "qwen2_moe": dict(
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
        mlp_only_layers=[],
        decoder_sparse_step=1,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, tmp_path: Path) -> None:
    """Three prompts of different lengths as one batch: ours padded on the right, transformers' on the left."""
    fields = draw_fields(family, 3) | GREEDY[family] | dict(max_position_embeddings=128, tie_word_embeddings=False)
    model = write_checkpoint(tmp_path, fields, seed=7)
    prompts = [random_ids(7, 3)[row, :length].tolist() for row, length in enumerate((9, 2, 6))]
    config = load_config(tmp_path)
    backend = BACKENDS["switch"]
    params = load_parameters(tmp_path, config, backend, jnp.float32)
    ours = continue_greedily(config, params, backend, prompts, new=64)
    assert ours == hf_greedy(model, prompts, new=64)
    assert len({tuple(row) for row in ours}) == 3 and len(set(sum(ours, []))) > 5
    whole = np.zeros((3, 9 + 64), np.int32)
    for row, prompt, new in zip(whole, prompts, ours, strict=True):
        row[: len(prompt) + 64] = prompt + new
    uncached = fast_jit(partial(reference_logits, config))(params, whole)
    for row, prompt, new in zip(np.asarray(uncached), prompts, ours, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 63].argmax(-1).tolist() == new
