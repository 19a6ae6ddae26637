"""Families whose attention has forms of its own, against transformers, and that every path has these forms."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from attention_models import FAMILIES, draw_fields
from driver import build, cached_logits, continue_greedily, random_tensors
from hf_models import hf_greedy, hf_logits, write_checkpoint
from published import same
from safetensors.numpy import load_file
from speculation import FastPrograms, decode, draft_config, plainly, small_head, speculating
from test_parity import quiet, reference_logits  # noqa: F401

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_source
from moespec_jax.checkpoint.write import export
from moespec_jax.config import DecoderConfig, QueryScale, RopeConfig, TreeConfig
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.nn.backend import BACKENDS

TOLERANCE = 5e-5  # on logits of standard deviation 1
TOKENS = 24  # longer than every window, and than the context
DRAWS = 20
QUICK = ["gpt_oss-0", "gpt_oss-1", *(f"{family}-{1 + number}" for number, family in enumerate(FAMILIES[1:]))]


def random_ids(number: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 64, (batch, TOKENS))


@pytest.mark.torch
@pytest.mark.slow_except(*QUICK)
@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, number: int, tmp_path: Path) -> None:
    """Without a cache, and compiled with one, by the back-ends in turn."""
    pytest.importorskip("torch")
    fields, ids = draw_fields(family, number), random_ids(number)
    model = write_checkpoint(tmp_path, fields, seed=number)
    expected = hf_logits(model, ids)
    assert 0.3 < expected.std() < 3
    config = load_config(tmp_path)
    params = load_parameters(tmp_path, config, BACKENDS["switch"], jnp.float32)
    np.testing.assert_allclose(reference_logits(config, params, ids), expected, atol=TOLERANCE, rtol=0)
    backend = BACKENDS[("slots", "pallas", "switch", "dense")[number % 4]]
    params = load_parameters(tmp_path, config, backend, jnp.float32)
    np.testing.assert_allclose(cached_logits(config, params, backend, ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.torch
@pytest.mark.slow_except("gpt_oss")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_there_and_back(family: str, tmp_path: Path) -> None:
    """Three prompts of different lengths as one batch; and through orbax to a directory equal to the bytes."""
    pytest.importorskip("torch")
    fields = draw_fields(family, 0) | dict(max_position_embeddings=128, tie_word_embeddings=False)
    model = write_checkpoint(tmp_path / "a", fields, seed=7)
    prompts = [random_ids(7, 3)[row, :length].tolist() for row, length in enumerate((9, 2, 6))]
    config, backend = load_config(tmp_path / "a"), BACKENDS["switch"]
    params = load_parameters(tmp_path / "a", config, backend, jnp.float32)
    ours = continue_greedily(config, params, backend, prompts, new=64)
    assert ours == hf_greedy(model, prompts, new=64)
    assert len({tuple(row) for row in ours}) == 3 and len(set(sum(ours, []))) > 5
    write_orbax(open_source(tmp_path / "a", config), config, tmp_path / "b")
    again = load_parameters(tmp_path / "b", config, backend, jnp.float32)
    assert same(again, params)
    export(again, config, tmp_path / "c", "float32", extra={"eos_token_id": 3})
    assert load_config(tmp_path / "c") == config
    before, back = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert back.keys() == before.keys()
    for name, value in before.items():
        assert (back[name].shape, back[name].tobytes()) == (value.shape, value.tobytes()), name


@pytest.mark.slow_except("gpt_oss-slots")
@pytest.mark.parametrize("backend", ["slots", "switch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_gives_the_tokens_of_plain_decoding(family: str, backend: str) -> None:
    # Most of the vocabulary: even a random head is right now and then.
    assert accepted_of_equal_text(family, backend, TreeConfig(1, 14, 18)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_chains_give_the_tokens_of_plain_decoding(family: str) -> None:
    assert accepted_of_equal_text(family, "switch", TreeConfig(2, 1, 4)) >= 0


def accepted_of_equal_text(family: str, backend: str, tree: TreeConfig) -> int:
    """Number of accepted tokens of a random head's drafts, whose text is that of plain decoding."""
    # Chunks and steps of Llama 4 that are shorter than the text.
    short = dict(attention_chunk_size=5, floor_scale=3, attn_scale=0.4) if family == "llama4_text" else {}
    config = read_config(draw_fields(family, 0) | dict(vocab_size=16, num_experts_per_tok=2) | short)
    params = build(config, random_tensors(config, 3), BACKENDS[backend])
    draft = draft_config(config, draft_vocab_size=16)
    head, prompts = small_head(draft, params), [[1, 2, 3, 4, 5], [7], [3, 6] * 6]
    plain = decode(plainly(config, params, BACKENDS[backend]), FastPrograms(), prompts, 20)
    drafted = speculating(config, params, BACKENDS[backend], draft, head, tree)
    run = decode(drafted, FastPrograms(), prompts, 20)
    assert run.sequences == plain.sequences
    return int(run.accepted.sum())


def scout(**changes: Any) -> DecoderConfig:
    """The text model of Llama-4-Scout, with the fields of its published config.json."""
    fields = dict(
        model_type="llama4_text", vocab_size=202048, hidden_size=5120, intermediate_size=8192,
        intermediate_size_mlp=16384, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
        num_experts_per_tok=1, num_local_experts=16, max_position_embeddings=10485760, rms_norm_eps=1e-5,
        rope_theta=500000.0, moe_layers=list(range(48)), interleave_moe_layer_step=1, use_qk_norm=True,
        no_rope_layers=[], attention_chunk_size=8192, attn_temperature_tuning=4, floor_scale=8192, attn_scale=0.1,
        router_aux_loss_coef=0.001, router_jitter_noise=0.0, cache_implementation="hybrid", for_llm_compressor=False,
        rope_scaling={
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    )  # fmt: skip
    return read_config(fields | changes)


def test_llama4_as_published() -> None:
    config = scout()
    assert config.rope_layers[:5] == (True, True, True, False, True) and all(config.sparse_layers)
    assert config.attention_chunks[:4] == (8192, 8192, 8192, 0)
    assert config.rope == RopeConfig("llama3", 500_000.0, 16.0, 8192, high_freq_factor=1.0, interleaved=True)
    assert config.query_scale == QueryScale(0.1, 8192) and config.context_length == 10485760
    assert (config.intermediate_size, config.moe_intermediate_size) == (16384, 8192)
    assert config.shared_expert_intermediate_size == 8192 and config.qk_norm == "unit"
    maverick = scout(moe_layers=list(range(1, 48, 2)), use_qk_norm=False, num_local_experts=128, rope_scaling=None)
    assert maverick.sparse_layers == (False, True) * 24 and maverick.qk_norm == "none"
    assert maverick == scout(
        moe_layers=None, interleave_moe_layer_step=2, use_qk_norm=False, num_local_experts=128, rope_scaling=None
    )


REFUSED = [
    ("flex_olmo", dict(clip_qkv=8.0), "clip_qkv"),
    ("llama4_text", dict(no_rope_layers=[1, 2, 1, 1]), "no_rope_layers"),
    ("llama4_text", dict(no_rope_layers=[1]), "no_rope_layers"),
    ("llama4_text", dict(layer_types=["sliding_attention"] * 4), "layer_types"),
    ("llama4_text", dict(layer_types=["chunked_attention"] * 4, attention_chunk_size=None), "attention_chunk_size"),
    ("llama4_text", dict(attention_chunk_size=0), "attention_chunk_size"),
    ("llama4_text", dict(moe_layers="all"), "moe_layers"),
    ("llama4_text", dict(attn_temperature_tuning="yes"), "attn_temperature_tuning"),
    ("llama4_text", dict(norm_topk_prob=True), "norm_topk_prob"),
    ("llama4_text", dict(model_type="llama4"), "text_config"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(family: str, changes: Any, named: str) -> None:
    with pytest.raises(UnsupportedConfig, match=named):
        read_config(draw_fields(family, 0) | changes)
