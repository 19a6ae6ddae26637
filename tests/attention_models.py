"""Random `config.json` of the families whose attention or norms have forms of their own: the published defaults first,
then every option of the config class in turn."""

from typing import Any

import numpy as np
from hf_models import CONTEXT, ROPES, Fields, draw_rope

FAMILIES = ("gpt_oss", "mellum", "exaone_moe", "afmoe", "laguna", "flex_olmo", "llama4_text")


def draw_fields(family: str, number: int) -> Fields:
    """The `number`-th random `config.json` of a family; number 0 leaves all that may be left out to the defaults."""
    rng = np.random.default_rng([100 + FAMILIES.index(family), number])
    heads = int(rng.choice([2, 4]))
    fields: Fields = dict(
        model_type=family,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=int(rng.choice([1, 2, heads])),
        head_dim=int(rng.choice([4, 12])),
        num_experts_per_tok=int(rng.integers(1, 4)),
        max_position_embeddings=CONTEXT if number else 64,
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        tie_word_embeddings=coin(rng),
        sliding_window=int(rng.integers(1, 12)),
    )
    return fields | _OF_FAMILY[family](number, rng)


def _kinds(rng: np.random.Generator) -> list[str]:
    return [("sliding_attention", "full_attention")[int(rng.integers(2))] for _ in range(4)]


def _gpt_oss(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_local_experts=int(rng.choice([3, 5])))
    if number == 0:
        return fields
    fields |= dict(swiglu_limit=float(rng.choice([0.5, 2.0])), attention_bias=coin(rng))
    fields |= dict(swiglu_alpha=1.3) if number % 3 == 1 else {}
    fields |= dict(layer_types=_kinds(rng)) if number % 2 else {}
    return fields | draw_rope(ROPES[number % 5], rng, new_spelling=number // 5 % 2 == 0)


def _mellum(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(
        num_experts=int(rng.choice([3, 5])), moe_intermediate_size=12, layer_types=_kinds(rng)
    )
    if number == 0:
        return fields
    fields |= dict(attention_bias=coin(rng), norm_topk_prob=coin(rng))
    fields |= dict(mlp_layer_types=[("dense", "sparse")[int(rng.integers(2))] for _ in range(4)]) if number % 2 else {}
    return fields | _ropes(number, rng)


def _exaone_moe(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_experts=8, moe_intermediate_size=12, norm_topk_prob=coin(rng))
    if number == 0:
        return fields
    groups = int(rng.choice([1, 2]))
    fields |= dict(n_group=groups, topk_group=int(rng.integers(1, groups + 1)), num_experts_per_tok=2)
    fields |= dict(num_shared_experts=int(rng.integers(1, 3)), routed_scaling_factor=float(rng.choice([1.0, 2.5])))
    fields |= [dict(layer_types=_kinds(rng)), dict(sliding_window_pattern=2), {}][number % 3]
    fields |= dict(first_k_dense_replace=2) if number % 2 else {}
    return fields | draw_rope(ROPES[number % 5], rng, new_spelling=True)


def _afmoe(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_experts=5, moe_intermediate_size=12, route_scale=float(rng.choice([1.0, 2.8])))
    if number == 0:
        return fields
    fields |= dict(num_shared_experts=int(rng.integers(1, 3)), num_dense_layers=int(rng.integers(0, 3)))
    fields |= dict(mup_enabled=coin(rng), attention_bias=coin(rng))
    fields |= dict(layer_types=_kinds(rng)) if number % 2 else dict(global_attn_every_n_layers=2)
    return fields | draw_rope(ROPES[number % 5], rng, new_spelling=True)


def _laguna(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_experts=5, moe_intermediate_size=12, shared_expert_intermediate_size=8)
    fields |= dict(head_dim=8, layer_types=_kinds(rng), num_attention_heads=4, num_key_value_heads=2)
    if number == 0:
        return fields
    fields |= dict(gating=(True, "per-head", "per-element", False)[number % 4], attention_bias=coin(rng))
    fields |= dict(moe_routed_scaling_factor=float(rng.choice([1.0, 2.5])))
    fields |= dict(mlp_layer_types=["sparse", "dense", "sparse", "sparse"]) if number % 2 else {}
    fields |= dict(num_attention_heads_per_layer=[4, 2, 4, 6]) if number % 3 == 1 else {}
    ropes = _ropes(number, rng)
    ropes["rope_parameters"]["full_attention"]["partial_rotary_factor"] = (0.5, 1.0)[number % 2]
    return fields | ropes


def _flex_olmo(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_experts=int(rng.choice([3, 5])), sliding_window=None, pad_token_id=None)
    if number == 0:
        return fields
    fields |= dict(attention_bias=coin(rng), norm_topk_prob=coin(rng), hidden_act=("silu", "gelu")[number % 2])
    return fields | draw_rope(ROPES[number % 5], rng, new_spelling=number // 5 % 2 == 0)


def _llama4_text(number: int, rng: np.random.Generator) -> dict[str, Any]:
    fields: dict[str, Any] = dict(num_local_experts=int(rng.choice([3, 5])), intermediate_size_mlp=28)
    fields |= dict(sliding_window=None, intermediate_size=12, num_experts_per_tok=int(rng.integers(1, 3)))
    if number == 0:
        return fields
    fields |= dict(attention_chunk_size=(5, 8, None)[number % 3], attention_bias=coin(rng), use_qk_norm=coin(rng))
    fields |= dict(attn_temperature_tuning=coin(rng), floor_scale=int(rng.integers(2, 6)), attn_scale=0.4)
    fields |= [dict(moe_layers=[0, 3]), dict(interleave_moe_layer_step=2), {}][int(rng.integers(3))]
    fields |= [dict(no_rope_layers=[1, 0, 1, 1]), dict(no_rope_layer_interval=2), {}][int(rng.integers(3))]
    if fields["attention_chunk_size"] and coin(rng):
        fields |= dict(layer_types=["chunked_attention", "full_attention", "full_attention", "chunked_attention"])
    fields |= draw_rope(ROPES[number % 5], rng, new_spelling=number // 5 % 2 == 0)
    if number % 10 == 4:  # llama3, as Scout has it: no frequency is between high and low
        fields["rope_parameters"] |= dict(low_freq_factor=1.0, high_freq_factor=1.0)
    return fields


def coin(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


def _ropes(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Rotary settings of both types of layers."""
    drawn = [draw_rope(ROPES[i % 5], rng, new_spelling=True)["rope_parameters"] for i in (number, number // 5 + 1)]
    return {"rope_parameters": dict(zip(("full_attention", "sliding_attention"), drawn, strict=True))}


_OF_FAMILY = {
    "gpt_oss": _gpt_oss,
    "mellum": _mellum,
    "exaone_moe": _exaone_moe,
    "afmoe": _afmoe,
    "laguna": _laguna,
    "flex_olmo": _flex_olmo,
    "llama4_text": _llama4_text,
}
