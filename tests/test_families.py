"""What a `config.json` may say: defaults as published, and every field we would compute wrongly refused by its name."""

from typing import Any

import numpy as np
import pytest
from hf_models import FAMILIES, Fields, draw_fields

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.rope import read_rope
from moespec_jax.config import RopeConfig
from moespec_jax.errors import UnsupportedConfig
from moespec_jax.nn.layers import rope_frequencies


def fields_of(family: str, **changes: Any) -> Fields:
    return draw_fields(family, 0) | changes


def refused(family: str, match: str, **changes: Any) -> None:
    read_config(fields_of(family))
    with pytest.raises(UnsupportedConfig, match=match):
        read_config(fields_of(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization_config", {"quant_method": "hqq"}),
        ("vocab_size", 0),
        ("vocab_size", "64"),
        ("vocab_size", 1 << 40),
        ("vocab_size", True),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 2.0),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("num_experts_per_tok", 99),
        ("max_position_embeddings", None),
        ("rms_norm_eps", "small"),
        ("hidden_act", "quick_gelu"),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_wrong_value_is_refused_by_name(family: str, name: str, value: Any) -> None:
    refused(family, name, **{name: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_field_is_refused_by_name(family: str) -> None:
    optional = {
        *("num_key_value_heads", "head_dim", "norm_topk_prob", "hidden_act", "tie_word_embeddings", "attention_bias"),
        *("qkv_bias", "clip_qkv", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        *("mlp_only_layers", "decoder_sparse_step", "rope_parameters", "rope_theta", "rope_scaling"),
    }
    required = set(fields_of(family)) - optional
    assert required >= {"model_type", "num_experts_per_tok", "hidden_size"}
    for name in required:
        rest = {key: value for key, value in fields_of(family).items() if key != name}
        with pytest.raises(UnsupportedConfig, match=name.replace("_local", "")):  # either name of the count will do
            read_config(rest)


@pytest.mark.parametrize("model_type", ["llama", None, 3, "deepseek_v3"])
def test_other_architectures_are_refused(model_type: Any) -> None:
    with pytest.raises(UnsupportedConfig, match="model_type") as caught:
        read_config({"model_type": model_type})
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type.*longrope"),
        ({"type": "mrope", "mrope_section": [1, 2]}, "rope_type.*mrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0, "surprise": 1.0}, "surprise"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "rope_theta": "big"}, "rope_theta"),
    ],
)
def test_other_rotary_settings_are_refused(family: str, place: str, scaling: Fields, match: str) -> None:
    fields = {key: value for key, value in fields_of(family).items() if not key.startswith("rope")}
    with pytest.raises(UnsupportedConfig, match=match):
        read_config(fields | {place: scaling})


def test_partial_rotary_heads_are_refused_at_the_top_too() -> None:
    refused("qwen3_moe", "partial_rotary_factor", partial_rotary_factor=0.25)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(layer_types=["full_attention"]), "layer_types"),
        (dict(layer_types=["chunked_attention", "full_attention"]), "layer_types"),
        (dict(use_sliding_window=False, layer_types=["sliding_attention", "full_attention"]), "layer_types"),
        (dict(decoder_sparse_step=0), "decoder_sparse_step"),
        (dict(decoder_sparse_step="2"), "decoder_sparse_step"),
    ],
)
def test_layer_settings_are_refused(changes: Fields, match: str) -> None:
    refused("qwen2_moe", match, **changes)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_families_of_one_window_refuse_a_mixture(family: str) -> None:
    """transformers does not read `layer_types` there: a mixture would silently be something else."""
    on: Fields = dict(use_sliding_window=True, sliding_window=5)
    refused(family, "layer_types", **on, layer_types=["full_attention", "sliding_attention"])
    agreeing = read_config(fields_of(family, **on, layer_types=["sliding_attention"] * 2))
    assert agreeing.sliding_windows == read_config(fields_of(family, **on)).sliding_windows == (5, 5)


def test_windows_as_published() -> None:
    def windows(family: str, **changes: Any) -> tuple[int, ...]:
        fields = fields_of(family, num_hidden_layers=5, **changes)
        fields.pop("layer_types", None)
        return read_config(fields).sliding_windows

    assert windows("qwen2_moe", use_sliding_window=True, sliding_window=7, max_window_layers=3) == (7, 0, 7, 0, 0)
    assert windows("qwen2_moe", use_sliding_window=False, sliding_window=7) == (0,) * 5
    assert windows("qwen3_moe", use_sliding_window=True, sliding_window=7, max_window_layers=3) == (7,) * 5
    assert windows("qwen3_moe", use_sliding_window=False, sliding_window=7) == (0,) * 5
    assert windows("mixtral", sliding_window=7) == (7,) * 5
    assert windows("mixtral", sliding_window=None) == (0,) * 5
    assert windows("olmoe", sliding_window=7) == (0,) * 5


def test_sparse_layers_as_published() -> None:
    fields = fields_of("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert read_config(fields).sparse_layers == (False, True, False, False, False, True)


def test_defaults_as_published() -> None:
    dropped = {"head_dim", "num_key_value_heads", "norm_topk_prob", "hidden_act", "tie_word_embeddings", "qkv_bias"}
    for family in FAMILIES:
        fields = {key: v for key, v in fields_of(family).items() if key not in dropped and not key.startswith("rope")}
        config = read_config(fields)
        assert config.head_dim == fields["hidden_size"] // fields["num_attention_heads"]
        assert config.num_key_value_heads == config.num_attention_heads
        assert config.norm_topk_prob == (family == "mixtral") and not config.tie_word_embeddings
        assert config.qkv_bias == (family == "qwen2_moe" or fields.get("attention_bias", False))
        assert config.hidden_act == "silu"
        assert config.rope == RopeConfig(rope_theta=1_000_000.0 if family == "mixtral" else 10_000.0)


def test_both_spellings_of_the_experts_count() -> None:
    fields = fields_of("qwen3_moe")
    count = fields.pop("num_experts")
    assert read_config(fields | {"num_local_experts": count}) == read_config(fields | {"num_experts": count})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dual_chunk_attention_config", {"chunk_size": 262144, "local_size": 8192}),
        ("sparse_attention_config", {"block": 64}),
        ("attention_chunk_size", 8192),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
        ("use_logn_attn", True),
        ("attn_temperature_tuning", True),
        ("alibi", True),
        ("rotary_pct", 0.25),
        ("rotary_base", 500_000),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 6.0),
        ("logit_scale", 0.0625),
        ("scoring_func", "sigmoid"),
        ("routed_scaling_factor", 2.5),
        ("n_group", 8),
        ("hidden_activation", "relu2"),
        ("compression_config", {"quant_method": "compressed-tensors"}),
    ],
)
def test_what_changes_numbers_and_leaves_no_tensor_is_refused(family: str, name: str, value: Any) -> None:
    refused(family, name, **{name: value})


def test_neutral_values_of_foreign_fields_are_accepted() -> None:
    neutral: Fields = dict(logits_scaling=1.0, alibi=False, scoring_func="softmax", dual_chunk_attention_config=None)
    neutral |= dict(attn_logit_softcapping=None, no_rope_layers=[], n_group=1, routed_scaling_factor=1)
    for family in FAMILIES:
        assert read_config(fields_of(family, **neutral)) == read_config(fields_of(family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"norm_topk_prob": False}),
        ("qwen3_moe", {"clip_qkv": 8.0}),
        ("olmoe", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_a_setting_of_another_family_is_refused(family: str, changes: Fields) -> None:
    refused(family, next(iter(changes)), **changes)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {"type": "default"}, "rope_theta": 1e6},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "factor": 2.0}, "rope_theta": 1e6},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},  # transformers takes 10000
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        {"rope_scaling": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}},
    ],
)
def test_contradictory_rotary_settings_are_refused(fields: Fields) -> None:
    with pytest.raises(UnsupportedConfig, match=r"expected rope_\w+[.\w]* and rope_\w+[.\w]* to agree, or one of them"):
        read_rope(fields, 10_000.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6, "rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": {**YARN, "rope_theta": 1e6, "mscale": None}},
        {"rope_theta": 1e6, "rope_scaling": YARN, "rope_parameters": None},
        {"rope_theta": 1e6, "rope_scaling": YARN, "rope_parameters": {}},
        {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 1e6}}},
        {"rope_theta": 1e6, "rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},
        {"rope_theta": 1e6, "rope_scaling": YARN | {"finetuned": True}},
        {"rope_theta": 1e6, "rope_scaling": YARN | {"original_max_position_embeddings": 32.0}},
        {"rope_theta": 1e6, "rope_scaling": YARN | {"attn_factor": 1.0, "extrapolation_factor": 1}},
        {"rope_theta": 1_000_000, "rope_scaling": YARN | {"factor": 4, "beta_fast": 32, "truncate": True}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32.0},
    ],
)
def test_rotary_settings_that_agree_are_read_in_any_form(fields: Fields) -> None:
    assert read_rope(fields, 10_000.0) == RopeConfig("yarn", 1e6, 4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize(
    "change", [{"original_max_position_embeddings": 32.5}, {"attn_factor": 0.5}, {"apply_yarn_scaling": False}]
)
def test_yarn_parameters_that_would_be_read_over_are_refused(change: Fields) -> None:
    with pytest.raises(UnsupportedConfig, match=next(iter(change))):
        read_rope({"rope_scaling": YARN | change}, 10_000.0)


@pytest.mark.torch
@pytest.mark.parametrize("extra", [{"finetuned": True}, {"original_max_position_embeddings": 32.0}, {"mscale": 0}])
def test_yarn_as_in_transformers(extra: Fields) -> None:
    torch = pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    fields = fields_of("qwen3_moe", head_dim=12, rope_theta=1e6, rope_scaling=YARN | extra, max_position_embeddings=128)
    fields.pop("rope_parameters", None)
    theirs, scale = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](transformers.Qwen3MoeConfig(**fields), torch.device("cpu"))
    ours, our_scale = rope_frequencies(read_config(fields).rope, 12, 128)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
    assert our_scale == pytest.approx(scale)


def test_both_spellings_of_the_rotary_settings() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "mscale": None}
    expected = RopeConfig("yarn", 5e5, 4.0, original_max_position_embeddings=32, beta_fast=16.0)
    for fields in (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "rope_type": "yarn", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16.0}}
        | {"original_max_position_embeddings": 32},
    ):
        assert read_rope(fields, 10_000.0) == expected
