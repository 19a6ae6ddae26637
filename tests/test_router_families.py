"""Families that differ in router, shared experts and dense layers: against transformers, in every back-end, and under
speculation and budgets."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from driver import build, cached_logits, continue_greedily
from hf_models import hf_greedy, hf_logits, write_checkpoint
from published import draw_tensors, write
from router_models import LONGROPE, ROUTER_FAMILIES, draw_fields
from safetensors.numpy import load_file
from speculation import FastPrograms, decode, draft_config, plainly, small_head, speculating
from test_parity import quiet, reference_logits  # noqa: F401, a fixture
from test_speculate import SMALL

from moespec_jax.checkpoint.families import FAMILIES, read_config
from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_source
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.checkpoint.write import export
from moespec_jax.config import RouterConfig, TreeConfig
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.moe import SparseMlp, sparse_mlp
from moespec_jax.nn.routing import sparsemixer_gates

TOLERANCE = 5e-5  # on logits of standard deviation 1; the largest difference seen is 1e-5
DRAWS = 20
PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 6] * 5]
every_family = pytest.mark.parametrize("family", ROUTER_FAMILIES)


def random_ids(number: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 64, (batch, 14))


@pytest.mark.torch
@pytest.mark.slow_except(*(f"{family}-{number}" for family in ROUTER_FAMILIES for number in range(1)))
@pytest.mark.parametrize("number", range(DRAWS))
@every_family
def test_logits(family: str, number: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = write_checkpoint(tmp_path, draw_fields(family, number), seed=number)
    config = load_config(tmp_path)
    params = load_parameters(tmp_path, config, BACKENDS["switch"], jnp.float32)
    expected = hf_logits(model, random_ids(number))
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(reference_logits(config, params, random_ids(number)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.torch
@pytest.mark.slow_except("glm4_moe")
@every_family
def test_greedy_tokens_of_a_batch_and_stacked_layers(family: str, tmp_path: Path) -> None:
    """64 tokens after three prompts of different lengths, one layer after the other, and logits of stacked layers."""
    pytest.importorskip("torch")
    model = write_checkpoint(tmp_path, draw_fields(family, 1) | dict(tie_word_embeddings=False), seed=3)
    config, prompts = load_config(tmp_path), [random_ids(7)[0, :length].tolist() for length in (9, 2, 6)]
    params = load_parameters(tmp_path, config, BACKENDS["switch"], jnp.float32)
    assert continue_greedily(config, params, BACKENDS["switch"], prompts, new=64) == hf_greedy(model, prompts, new=64)
    stacked, ids = load_parameters(tmp_path, config, BACKENDS["slots"], jnp.float32), random_ids(5)
    got = cached_logits(config, stacked, BACKENDS["slots"], ids)
    np.testing.assert_allclose(got, hf_logits(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.torch
@pytest.mark.slow_except("granitemoeshared")
@every_family
def test_transformers_loads_what_is_written(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import transformers

    fields = draw_fields(family, 4)
    config = read_config(fields)
    write_checkpoint(tmp_path / "first", fields, seed=4)
    params = load_parameters(tmp_path / "first", config, BACKENDS["switch"], jnp.float32)
    export(params, config, tmp_path / "again", jnp.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype="float32", attn_implementation="eager"
    )
    got = reference_logits(config, params, random_ids(4))
    np.testing.assert_allclose(got, hf_logits(model, random_ids(4)), atol=TOLERANCE, rtol=0)


def pair(family: str, backend: str = "switch") -> tuple[Any, ...]:
    number = 3 if family == "phimoe" else 2  # the second's bias of logits is unlike any draft
    fields = draw_fields(family, number) | dict(vocab_size=16, max_position_embeddings=512, tie_word_embeddings=False)
    config = read_config(fields)
    params = build(config, draw_tensors(fields), BACKENDS[backend])
    draft = draft_config(config, draft_vocab_size=12, boundaries=(0, 1, 2))
    return config, params, BACKENDS[backend], draft, small_head(draft, params)


@pytest.mark.slow_except("slots-glm4_moe")
@every_family
@pytest.mark.parametrize("backend", ["switch", "slots"])
def test_greedy_speculation_is_plain_decoding(backend: str, family: str) -> None:
    parts = pair(family, backend)
    plain = decode(plainly(*parts[:3]), FastPrograms(), PROMPTS, 60)
    drafted = decode(speculating(*parts, SMALL), FastPrograms(), PROMPTS, 60)
    assert drafted.sequences == plain.sequences
    assert drafted.accepted.sum() > 5


@pytest.mark.slow
@every_family
def test_greedy_chains_are_plain_decoding(family: str) -> None:
    parts = pair(family)
    plain = decode(plainly(*parts[:3]), FastPrograms(), PROMPTS, 30)
    assert decode(speculating(*parts, TreeConfig(2, 1, 4)), FastPrograms(), PROMPTS, 30).sequences == plain.sequences


@every_family
def test_written_and_read_again(family: str, tmp_path: Path) -> None:
    """Through our writer in bfloat16, and through orbax: the same tensors under the same names; what the family keeps
    in float32 stays so."""
    for number in range(3):
        fields = draw_fields(family, number)
        tensors = draw_tensors(fields)
        first = write(tmp_path / f"{number}", fields, tensors)
        config, table = load_config(first), tensor_table(load_config(first))
        params = load_parameters(first, config, BACKENDS["switch"], jnp.float32)
        export(params, config, tmp_path / f"again{number}", jnp.bfloat16)
        assert load_config(tmp_path / f"again{number}") == config
        again = open_source(tmp_path / f"again{number}", config)
        for name, array in again.read(table):
            wide = table[name].float32
            assert again.dtypes[name] == (np.float32 if wide else jnp.bfloat16)
            np.testing.assert_array_equal(array, tensors[name] if wide else tensors[name].astype(jnp.bfloat16))
        names = load_file(tmp_path / f"again{number}" / "model.safetensors").keys()
        fused = {
            "model.layers.1.block_sparse_moe.input_linear.weight",
            "model.layers.1.block_sparse_moe.router.layer.weight",
        }
        assert fused <= names if family.startswith("granite") else names == tensors.keys()
        write_orbax(open_source(first, config), config, tmp_path / f"orbax{number}")
        for name, array in open_source(tmp_path / f"orbax{number}", config).read(table):
            np.testing.assert_array_equal(array, tensors[name])


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """GLM's files have one more layer; so would not a family without it."""
    for family, refused in (("glm4_moe", False), ("dots1", True)):
        fields = draw_fields(family, 0)
        tensors = draw_tensors(fields)
        more = {"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32)}
        directory = write(tmp_path / family, fields, tensors | more)
        if refused:
            with pytest.raises(CheckpointError, match=r"1 unknown: model.layers.3.eh_proj"):
                open_source(directory, load_config(directory))
        else:
            assert open_source(directory, load_config(directory)).dtypes.keys() == tensors.keys()


@pytest.mark.parametrize(("active", "softcap"), [(1, 0.0), (2, 0.7)])
def test_weights_that_scale_the_inputs_of_experts(active: int, softcap: float) -> None:
    """Llama-4's experts read the token times its sigmoid; Laguna's logits may be capped: against a loop in NumPy."""
    fields = draw_fields("minimax_m2", 0) | dict(num_experts_per_tok=active)
    config = read_config(fields)
    router = RouterConfig("sigmoid", softcap=softcap, scales_input=True)
    config = dataclasses.replace(config, router=router, norm_topk_prob=False, hidden_act="silu")
    params = build(read_config(fields), draw_tensors(fields), BACKENDS["switch"])
    assert isinstance(params.layers[0].mlp, SparseMlp)
    layer, experts = dataclasses.replace(params.layers[0].mlp, correction=None), params.experts
    x = np.random.default_rng(0).standard_normal((5, config.hidden_size)).astype(np.float32)
    valid = jnp.array([True, True, False, True, True])
    got, _ = sparse_mlp(config, layer, experts, 0, jnp.asarray(x), valid, BACKENDS["switch"].compute("silu"))
    for t, row in enumerate(x):
        logits = np.asarray(layer.router) @ row
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        expected = np.zeros_like(row)
        for e in np.argsort(-logits)[:active] if valid[t] else []:
            expert, scaled = experts[0][e], row / (1 + np.exp(-logits[e]))
            gate = scaled @ np.asarray(expert.gate)
            expected += (gate / (1 + np.exp(-gate)) * (scaled @ np.asarray(expert.up))) @ np.asarray(expert.down)
        np.testing.assert_allclose(got[t], expected, rtol=1e-4, atol=1e-3)


def test_sparsemixer_weighs_other_experts_in_proportion() -> None:
    """Experts that only a budget chooses: against a loop in NumPy over what transformers defines for the best two."""
    logits = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32) * 0.2 + 1
    gates = np.asarray(sparsemixer_gates(jnp.asarray(logits), 0.1))
    for row, found in zip(logits, gates, strict=True):
        first, second = np.argsort(-row)[:2]
        left = np.ones(5, bool)
        for chosen in (first, second):
            near = left & ~((row[chosen] - row) / np.maximum(abs(row), row[chosen]) > 0.2)
            np.testing.assert_allclose(found[chosen], np.exp(row[chosen]) / np.exp(row[near]).sum(), rtol=1e-5)
            left[chosen] = False
        np.testing.assert_allclose(found[left] / found[second], np.exp(row[left] - row[second]), rtol=1e-5)


def test_phimoe_as_published() -> None:
    """The context of longrope is the original one; where the sliding window is as long as the extended context."""
    scaling = LONGROPE | dict(original_max_position_embeddings=4096)
    fields = draw_fields("phimoe", 0) | dict(max_position_embeddings=131072, sliding_window=131072)
    config = read_config(fields | dict(rope_scaling=scaling, original_max_position_embeddings=4096))
    assert (config.context_length, config.rope.rope_type, config.rope.short_mscale) == (4096, "longrope", 1.2)
    assert read_config(fields | dict(rope_scaling=None)).context_length == 131072


REFUSED = [
    ("glm4_moe", dict(topk_group=9), "topk_group"),
    ("glm4_moe", dict(n_group=3), "n_group"),
    ("glm4_moe", dict(partial_rotary_factor=1.5), "partial_rotary_factor"),
    ("glm4_moe", dict(partial_rotary_factor=0.125), "rotated"),
    ("glm4_moe", dict(first_k_dense_replace=-1), "first_k_dense_replace"),
    ("glm4_moe", dict(scoring_func="softmax"), "scoring_func"),
    ("dots1", dict(topk_method="greedy"), "topk_method"),
    ("solar_open", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("minimax_m2", dict(norm_topk_prob=False), "norm_topk_prob"),
    ("minimax_m2", dict(routed_scaling_factor=2.0), "routed_scaling_factor"),
    ("hy_v3", dict(mlp_layer_types=["dense"]), "mlp_layer_types"),
    ("hy_v3", dict(mlp_bias=True), "mlp_bias"),
    ("ernie4_5_moe", dict(use_bias=True), "use_bias"),
    ("ernie4_5_moe", dict(moe_layer_start_index="1"), "moe_layer_start_index"),
    ("hunyuan_v1_moe", dict(moe_topk=[1, 2, 1]), "moe_topk"),
    ("hunyuan_v1_moe", dict(num_shared_expert=[2, 2, 2]), "num_shared_expert"),
    ("hunyuan_v1_moe", dict(use_cla=True), "use_cla"),
    ("phimoe", dict(num_experts_per_tok=3), "num_experts_per_tok"),
    ("phimoe", dict(norm_topk_prob=True), "norm_topk_prob"),
    ("phimoe", dict(router_jitter_noise="0.1"), "router_jitter_noise"),
    ("phimoe", dict(rope_scaling=dict(type="yarn", factor=2.0)), "rope_type.*yarn"),
    ("phimoe", dict(rope_scaling=LONGROPE | dict(short_factor=[1.0])), "short_factor"),
    ("phimoe", dict(rope_scaling=LONGROPE | dict(long_mscale=None)), "long_mscale"),
    ("phimoe", dict(rope_scaling=LONGROPE | dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    ("phimoe", dict(rope_scaling=LONGROPE, rope_parameters=dict(rope_type="default")), "rope"),
    ("deepseek_v3", {}, "latent attention"),
    ("qwen3_next", {}, "linear attention"),
    ("nemotron_h", {}, "state-space"),
    ("qwen3_moe", dict(scoring_func="sigmoid"), "scoring_func"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(family: str, changes: Any, named: str) -> None:
    known = family if family in ROUTER_FAMILIES else "hy_v3"
    with pytest.raises(UnsupportedConfig, match=named):
        read_config(draw_fields(known, 0) | dict(model_type=family) | changes)


def test_every_family_is_drawn_somewhere() -> None:
    assert set(ROUTER_FAMILIES) <= set(FAMILIES)
