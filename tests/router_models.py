"""Drawn `config.json` files of the families that differ from those of `hf_models` in their routers, their shared
experts, and where their dense layers are."""

from collections.abc import Callable

import numpy as np
from hf_models import Fields

Draw = Callable[[np.random.Generator], Fields]


def draw_fields(family: str, number: int) -> Fields:
    """The `number`-th random `config.json` of a family."""
    rng = np.random.default_rng([sorted(ROUTER_FAMILIES).index(family), number, 18])
    heads = int(rng.choice([2, 4]))
    fields: Fields = dict(
        model_type=family,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=int(rng.choice([1, 2, heads])),
        head_dim=8,
        num_experts_per_tok=int(rng.integers(1, 4)),
        max_position_embeddings=128,
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        hidden_act=str(rng.choice(["silu", "silu", "gelu"])),
        tie_word_embeddings=coin(rng),
        rope_theta=float(rng.choice([100.0, 10_000.0])),
    )
    fields |= ROUTER_FAMILIES[family](rng)
    return {name: value for name, value in fields.items() if value is not ABSENT}


def coin(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


ABSENT = object()


def _deepseek(rng: np.random.Generator) -> Fields:
    groups = int(rng.choice([1, 2, 4]))
    return dict(
        moe_intermediate_size=12,
        n_routed_experts=8,
        n_shared_experts=int(rng.integers(1, 3)),
        n_group=groups,
        topk_group=int(rng.integers((groups + 1) // 2, groups + 1)),
        routed_scaling_factor=float(rng.choice([1.0, 2.5])),
        norm_topk_prob=coin(rng),
        attention_bias=coin(rng),
    )


def _glm4_moe(rng: np.random.Generator) -> Fields:
    partial: Fields = dict(partial_rotary_factor=float(rng.choice([0.25, 0.5, 1.0]))) if coin(rng) else {}
    return _deepseek(rng) | partial | dict(first_k_dense_replace=int(rng.integers(0, 3)), use_qk_norm=coin(rng))


def _dots1(rng: np.random.Generator) -> Fields:
    window = int(rng.integers(2, 9)) if coin(rng) else None
    dense = dict(first_k_dense_replace=int(rng.integers(0, 3)))
    return _deepseek(rng) | dict(sliding_window=window, max_window_layers=int(rng.integers(3))) | dense


def _solar_open(rng: np.random.Generator) -> Fields:
    return _deepseek(rng) | dict(intermediate_size=ABSENT)


def _minimax_m2(rng: np.random.Generator) -> Fields:
    return dict(num_local_experts=6) | (dict(rotary_dim=4) if coin(rng) else {})


def _hy_v3(rng: np.random.Generator) -> Fields:
    kinds = [["sparse", "dense", "sparse"], ["dense", "sparse", "sparse"], None][int(rng.integers(3))]
    return dict(
        moe_intermediate_size=12,
        num_experts=6,
        num_shared_experts=int(rng.integers(1, 3)),
        router_scaling_factor=float(rng.choice([1.0, 2.826])),
        mlp_layer_types=kinds,
        attention_bias=coin(rng),
        enable_moe_fp32_combine=coin(rng),
    )


def _ernie4_5_moe(rng: np.random.Generator) -> Fields:
    return dict(
        moe_intermediate_size=12,
        moe_k=int(rng.integers(1, 4)),
        num_experts_per_tok=ABSENT,
        moe_num_experts=6,
        moe_num_shared_experts=int(rng.integers(0, 3)),
        moe_layer_start_index=int(rng.integers(0, 2)),
        moe_layer_end_index=int(rng.choice([-1, 1, 2])),
        moe_layer_interval=int(rng.integers(1, 3)),
        moe_norm_min=float(rng.choice([1e-12, 0.7])),
    )


def _hunyuan_v1_moe(rng: np.random.Generator) -> Fields:
    topk = int(rng.integers(1, 4))
    alpha: Fields = dict(rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0}) if coin(rng) else {}
    return alpha | dict(
        num_experts=5,
        moe_topk=[topk] * 3 if coin(rng) else topk,
        num_experts_per_tok=ABSENT,
        attention_bias=coin(rng),
    )


def _granitemoe(rng: np.random.Generator) -> Fields:
    return dict(
        num_local_experts=5,
        attention_bias=coin(rng),
        embedding_multiplier=float(rng.choice([1.0, 12.0])),
        attention_multiplier=float(rng.choice([0.1, 1.0])),
        residual_multiplier=float(rng.choice([0.22, 1.0])),
        logits_scaling=float(rng.choice([1.0, 1.5])),
    )


def _granitemoeshared(rng: np.random.Generator) -> Fields:
    return _granitemoe(rng) | dict(shared_intermediate_size=int(rng.choice([0, 16])))


LONGROPE: Fields = dict(
    type="longrope",
    short_mscale=1.2,
    long_mscale=1.3,
    short_factor=[1.0, 1.1, 1.3, 2.0],
    long_factor=[1.0, 2.0, 3.0, 4.0],
    original_max_position_embeddings=64,
)


def _phimoe(rng: np.random.Generator) -> Fields:
    window = int(rng.integers(2, 9)) if coin(rng) else None
    return dict(
        num_local_experts=int(rng.choice([3, 5])),
        num_experts_per_tok=2,
        sliding_window=window,
        attention_bias=coin(rng),
        lm_head_bias=coin(rng),
        router_jitter_noise=float(rng.choice([0.01, 0.3, 0.0])),
        rope_scaling=LONGROPE if coin(rng) else None,
    )


ROUTER_FAMILIES: dict[str, Draw] = {
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
    "solar_open": _solar_open,
    "minimax_m2": _minimax_m2,
    "hy_v3": _hy_v3,
    "ernie4_5_moe": _ernie4_5_moe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "phimoe": _phimoe,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
}
