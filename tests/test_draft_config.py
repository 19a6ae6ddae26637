"""A head's config.json and shapes become the settings it was trained under, or an error that says what is not so."""

import dataclasses
from typing import Any

import pytest
from draft_heads import (
    FFN,
    HEAD,
    MODEL,
    VOCAB,
    eagle_fields,
    head_tensors,
    specforge_fields,
    speculators_fields,
    target,
)

from moespec_jax.checkpoint.head.boundaries import resolve_boundaries
from moespec_jax.checkpoint.head.config import HeadDescription, describe_head
from moespec_jax.config import RopeConfig
from moespec_jax.errors import CheckpointError, UnsupportedConfig

IDS = "eagle_aux_hidden_state_layer_ids"
FIELDS = {"eagle": eagle_fields, "specforge": specforge_fields, "speculators": speculators_fields}


def output_ids(*ids: int) -> dict[str, Any]:
    return {"eagle_config": {IDS: list(ids)}}


def boundary_ids(*ids: int) -> dict[str, Any]:
    return {IDS: list(ids)}


# Format, target type, layers, what the file says, name of the head; and what was tapped in training.
PUBLISHED: dict[str, tuple[Any, str, int, dict[str, Any], str, tuple[int, ...]]] = {
    "EAGLE default": ("eagle", "qwen3_moe", 32, {}, "", (2, 16, 29)),
    "SpecForge default": ("specforge", "qwen3_moe", 32, {}, "", (2, 16, 29)),
    "SpecForge default ids": ("specforge", "qwen3_moe", 32, output_ids(1, 15, 28), "", (2, 16, 29)),
    "ModelOpt without ids": ("specforge", "qwen3_moe", 32, output_ids(), "", (2, 16, 29)),
    "vLLM default": ("eagle", "qwen3_moe", 32, {}, "", (2, 16, 29)),
    "vLLM ids": ("eagle", "qwen3_moe", 32, boundary_ids(2, 16, 30), "", (2, 16, 30)),
    "speculators default": ("speculators", "qwen3_moe", 32, {}, "", (2, 16, 29)),
    "speculators ids": ("speculators", "qwen3_moe", 32, boundary_ids(0, 16, 32), "", (0, 16, 32)),
    "Qwen3-30B-A3B": ("eagle", "qwen3_moe", 48, {}, "AngelSlim/Qwen3-a3B_eagle3", (2, 24, 45)),
    "Qwen3-235B-A22B": ("specforge", "qwen3_moe", 94, output_ids(1, 46, 90), "", (2, 47, 91)),
    "OLMoE": ("eagle", "olmoe", 16, {}, "wantsleep/OLMoE_1B_7B_Eagle3", (2, 8, 15)),
    "OLMoE by SpecForge": ("specforge", "olmoe", 16, {}, "", (2, 8, 13)),
    "granite": ("eagle", "granitemoe", 24, {}, "wantsleep/granite-3.1-1b-a400m-EAGLE3", (0, 12, 23)),
    "granite, a directory": ("eagle", "granitemoe", 24, {}, "/heads/granite-3.1-1b-a400m-EAGLE3/", (0, 12, 23)),
    "gpt-oss-20b": ("specforge", "gpt_oss", 24, output_ids(1, 11, 21), "", (2, 12, 22)),
    "gpt-oss-120b": ("specforge", "gpt_oss", 36, output_ids(1, 17, 33), "lmsys/EAGLE3-gpt-oss-120b-bf16", (2, 18, 34)),
    "gpt-oss-120b long": ("specforge", "gpt_oss", 36, output_ids(1, 17, 32), "", (2, 18, 33)),
    "gpt-oss-120b v3": (
        *("specforge", "gpt_oss", 36, output_ids(24, 30, 36), "nvidia/gpt-oss-120b-Eagle3-v3"),
        (24, 30, 36),
    ),
    "gpt-oss-120b v3, cached": (
        *("specforge", "gpt_oss", 36, output_ids(24, 30, 36)),
        "/hub/models--nvidia--gpt-oss-120b-Eagle3-v3/snapshots/0",
        (24, 30, 36),
    ),
    "Llama-4-Maverick": ("specforge", "llama4", 48, output_ids(1, 23, 44), "", (2, 24, 45)),
    "DeepSeek-V3": ("specforge", "deepseek_v3", 61, output_ids(1, 29, 57), "", (2, 30, 58)),
    "Mixtral-8x7B": ("eagle", "mixtral", 32, {}, "", (2, 16, 29)),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_heads_tap_what_they_were_trained_on(row: str) -> None:
    head_format, model_type, layers, fields, name, expected = PUBLISHED[row]
    found = resolve_boundaries(fields, head_format, target(model_type, layers), name)
    assert found.values == expected and found.origin


# Ids in eagle_config that do not begin with 1: what is tapped, and whether the origin calls it ambiguous.
AMBIGUOUS: list[tuple[Any, int, dict[str, Any], tuple[int, ...], bool]] = [
    ("specforge", 48, output_ids(2, 24, 45), (2, 24, 45), True),  # the default boundaries themselves
    ("eagle", 32, output_ids(2, 16, 29), (2, 16, 29), True),
    ("specforge", 48, output_ids(2, 24, 44), (3, 25, 45), True),
    ("specforge", 48, output_ids(0, 23, 44), (1, 24, 45), True),
    ("specforge", 48, output_ids(1, 23, 44), (2, 24, 45), False),
    ("specforge", 48, output_ids(1, 23, 44) | boundary_ids(2, 24, 45), (2, 24, 45), False),
    ("specforge", 48, output_ids(1, 23, 44) | boundary_ids(1, 23, 44), (2, 24, 45), True),
    ("speculators", 48, boundary_ids(2, 24, 45), (2, 24, 45), False),
]


@pytest.mark.parametrize(("head_format", "layers", "fields", "expected", "ambiguous"), AMBIGUOUS)
def test_ids_of_two_conventions_name_the_probe(
    head_format: Any, layers: int, fields: dict[str, Any], expected: tuple[int, ...], ambiguous: bool
) -> None:
    found = resolve_boundaries(fields, head_format, target(layers=layers))
    assert found.values == expected
    assert ("ambiguous" in found.origin and "python -m convert.probe_draft" in found.origin) == ambiguous


def test_explicit_boundaries_win_over_everything() -> None:
    found = resolve_boundaries(
        output_ids(1, 2, 3), "specforge", target(layers=36), "x/gpt-oss-120b-Eagle3-v3", (0, 5, 36)
    )
    assert found.values == (0, 5, 36)


@pytest.mark.parametrize(
    "fields",
    [{}, boundary_ids(2, 2, 3), boundary_ids(2, 3, 5), boundary_ids(-1, 1, 2), {IDS: [True, 2, 3]}, {IDS: "123"}],
)
def test_boundaries_that_do_not_rise_within_the_target_are_refused(fields: dict[str, Any]) -> None:
    # With four layers the formula gives 2, 2, 1.
    with pytest.raises(UnsupportedConfig, match="name them explicitly|list of integers"):
        resolve_boundaries(fields, "eagle", target(layers=4))


def described(fields: dict[str, Any], hidden_size: int = MODEL, drop: str = "", **tensors: Any) -> HeadDescription:
    shapes = {name: tensor.shape for name, tensor in head_tensors(width=hidden_size, **tensors).items() if name != drop}
    return describe_head(fields, shapes, target(hidden_size=hidden_size), where="HERE")


@pytest.mark.parametrize("head_format", FIELDS)
def test_formats_are_told_apart_and_read_alike(head_format: str) -> None:
    found = described(FIELDS[head_format]())
    config = found.config
    assert found.format == head_format
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (MODEL, FFN, HEAD)
    assert config.boundaries == ((2, 4, 5) if head_format == "eagle" else (2, 4, 6))
    assert (config.num_hidden_layers, config.rms_norm_eps, config.vocab_size) == (1, 1e-5, VOCAB)
    # vLLM takes this as on where a speculators file says nothing.
    assert config.norm_before_residual == (head_format == "speculators")
    assert config.rope == RopeConfig() and not config.own_embedding and config.qk_norm == "none"
    assert found.notes[0].startswith("boundaries 2, 4, ") and len(found.notes) == 1


def test_the_tensors_win_over_the_file() -> None:
    found = described(eagle_fields(intermediate_size=99, head_dim=4, draft_vocab_size=13, hidden_size=17))
    assert (found.config.intermediate_size, found.config.head_dim, found.config.draft_vocab_size) == (FFN, HEAD, 12)
    assert [f"{name} " in " ".join(found.notes) for name in ("intermediate_size", "head_dim", "hidden_size")] == [
        True
    ] * 3
    assert len(found.notes) == 5


NORMS = {"midlayer.self_attn.q_norm.weight": (HEAD,), "midlayer.self_attn.k_norm.weight": (HEAD,)}
BIASES = {f"midlayer.self_attn.{name}_proj.bias": (16,) for name in "qkv"}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "explicit residual": (specforge_fields(norm_before_residual=True), {}, {"norm_before_residual": True}),
    "no residual": (speculators_fields(norm_before_residual=False), {}, {"norm_before_residual": False}),
    "norm before fc": (eagle_fields(), {"input_norm.weight": (48,)}, {"norm_before_fc": True}),
    "norm each": (eagle_fields(), {f"fc_norm.{i}.weight": (16,) for i in range(3)}, {"fc_norm": True}),
    "query norm": (eagle_fields(), NORMS, {"qk_norm": "head"}),
    "biases": (eagle_fields(), BIASES, {"attention_bias": True}),
    "fc bias": (eagle_fields(), {"fc.bias": (16,)}, {"fc_bias": True}),
    "own embedding": (eagle_fields(), {"embed_tokens.weight": (VOCAB, MODEL)}, {"own_embedding": True}),
    "output normed": (speculators_fields(norm_output=True), {}, {"norm_output": True}),
    "output, SpecForge": (specforge_fields(norm_output=True), {}, {"norm_output": False}),
    "file asks for fc_norm": (specforge_fields(fc_norm=True), {}, {"fc_norm": True}),
    "Qwen3 layer": (speculators_fields(layer={"model_type": "qwen3"}), {}, {"qk_norm": "head"}),
    "rope, version 4": (
        *(specforge_fields(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0}), {}),
        {"rope": RopeConfig("linear", 1e6, 2.0)},
    ),
    "rope, version 5": (
        *(specforge_fields(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {}),
        {"rope": RopeConfig(rope_theta=5e5)},
    ),
    "rope, nested": (speculators_fields(layer={"rope_theta": 7e4}), {}, {"rope": RopeConfig(rope_theta=7e4)}),
    "missing layers": (specforge_fields(num_hidden_layers=3), {}, {"num_hidden_layers": 3}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_read(variant: str) -> None:
    fields, extra, expected = VARIANTS[variant]
    config = described(fields, extra=extra).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_several_layers_and_a_narrow_head() -> None:
    assert described(eagle_fields(), layers=3).config.num_hidden_layers == 3
    config = described(eagle_fields(target_hidden_size=32), hidden_size=32).config
    assert (config.hidden_size, config.target_hidden_size, config.own_embedding) == (MODEL, 32, True)


def test_ambiguity_is_told() -> None:
    assert "ambiguous" in described(specforge_fields(norm_output=False)).notes[-1]
    assert "trains with 10000" in described(eagle_fields(rope_theta=1e6)).notes[-1]
    extra = {f"fc_norm.{i}.weight": (16,) for i in range(3)}
    assert "fc_norm false" in described(specforge_fields(fc_norm=False), extra=extra).notes[-1]


def nested(**flags: Any) -> dict[str, Any]:
    return specforge_fields(eagle_config={IDS: [1, 3, 5], **flags})


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no taps": (nested(use_aux_hidden_state=False), {}, "use_aux_hidden_state false"),
    "no first norm": (nested(use_input_layernorm_in_first_layer=False), {}, "use_input_layernorm_in_first_layer"),
    "no last norm": (nested(use_last_layernorm=False), {}, "use_last_layernorm"),
    "mtp norm": (nested(use_mtp_layernorm=True), {}, "use_mtp_layernorm true"),
    "irregular": (nested(next_layer_regular=False), {}, "next_layer_regular"),
    "parallel": (nested(parallel_draft_step=4), {}, "parallel_draft_step 4"),
    "latent": (eagle_fields(kv_lora_rank=512), {}, "latent attention.*kv_lora_rank 512"),
    "latent tensor": (eagle_fields(), {"midlayer.self_attn.kv_a_proj_with_mqa.weight": (8, 8)}, "latent attention"),
    "window": (eagle_fields(use_sliding_window=True), {}, "use_sliding_window"),
    "window by type": (speculators_fields(layer={"layer_types": ["sliding_attention"]}), {}, "sliding_attention"),
    "mlp bias": (eagle_fields(mlp_bias=True), {}, "mlp_bias"),
    "multiplier": (eagle_fields(residual_multiplier=0.22), {}, "residual_multiplier 0.22"),
    "other speculator": (speculators_fields(speculators_model_type="peagle"), {}, "speculators_model_type eagle3"),
    "quantised": (eagle_fields(quantization_config={"bits": 4}), {}, "quantization_config"),
    "activation": (eagle_fields(hidden_act="relu2"), {}, "hidden_act"),
    "both norms": (eagle_fields(fc_norm=True), {"input_norm.weight": (48,)}, "one of norm_before_fc and fc_norm"),
    "rope": (eagle_fields(rope_scaling={"type": "mrope"}), {}, "rope_type"),
    "rope, no object": (eagle_fields(rope_scaling=3), {}, "rope_scaling to be an object"),
    "no head count": (eagle_fields(num_attention_heads=None), {}, "num_attention_heads"),
    "heads": (eagle_fields(num_attention_heads=3), {}, "3 and 2 heads of one even size"),
    "odd heads": (eagle_fields(num_attention_heads=32, num_key_value_heads=16), {}, "one even size"),
    "huge count": (eagle_fields(num_attention_heads=10**9), {}, "integer from 1 to"),
    "flag": (eagle_fields(norm_before_residual="yes"), {}, "true or false"),
    "number": (eagle_fields(rms_norm_eps=0), {}, "positive number"),
    "object": (specforge_fields(eagle_config=[1]), {}, "eagle_config to be an object"),
    "vocabulary": (eagle_fields(vocab_size=VOCAB + 1), {}, "vocabulary of 40, as this qwen3_moe has; .* 41"),
    "width": (eagle_fields(target_hidden_size=64), {}, "width 16, as this qwen3_moe has: fc.weight with 48 inputs"),
    "count of taps": (specforge_fields((1, 2, 3, 4)), {}, "for 4 states .* with 64 inputs; it has 48"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(what: str) -> None:
    fields, extra, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        described(fields, extra=extra)
    assert str(caught.value).endswith("(HERE)") and "\n" not in str(caught.value)


def test_a_head_of_eagle_1_is_named_as_such() -> None:
    shapes = {"fc.weight": (MODEL, 2 * MODEL), "layers.0.mlp.gate_proj.weight": (FFN, MODEL)}
    with pytest.raises(CheckpointError, match="EAGLE-1 or EAGLE-2"):
        describe_head(eagle_fields(), shapes, target())


def test_a_head_for_another_target_is_refused() -> None:
    shapes = {name: tensor.shape for name, tensor in head_tensors().items()}
    wide = dataclasses.replace(target(), hidden_size=24)
    with pytest.raises(CheckpointError, match="fc.weight with 72 inputs; it has 48"):
        describe_head(eagle_fields(), shapes, wide)
