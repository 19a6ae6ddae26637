"""ERNIE-4.5-MoE."""

from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, as_number, read_count, require_count, shown
from moespec_jax.checkpoint.families.family import Family, TensorNames
from moespec_jax.checkpoint.families.parts import read_common, read_uniform_windows
from moespec_jax.config import DecoderConfig, RouterConfig
from moespec_jax.errors import UnsupportedConfig


def _read_ernie(fields: Fields) -> DecoderConfig:
    layers = require_count([fields], "num_hidden_layers")
    active = {"num_experts_per_tok": read_count([fields], "moe_k", fields.get("num_experts_per_tok", 6))}
    width = require_count([fields], "moe_intermediate_size")
    shared = {"moe_num_shared_experts": fields.get("moe_num_shared_experts", 2) or None}  # 0 stands for none
    return DecoderConfig(
        **read_common({"tie_word_embeddings": True, **fields, **active}, rope_theta=500_000.0, interleaved=True),
        intermediate_size=require_count([fields], "intermediate_size"),
        moe_intermediate_size=width,
        num_experts=read_count([fields], "moe_num_experts", fields.get("num_experts", 64)),
        shared_expert_intermediate_size=width * read_count([shared], "moe_num_shared_experts", 0),
        shared_expert_gate=False,
        sparse_layers=_sparse_layers(fields, layers),
        sliding_windows=read_uniform_windows(fields, layers, 0),
        norm_topk_prob=True,
        router=RouterConfig(
            correction=True, norm_min=as_number("moe_norm_min", fields.get("moe_norm_min", 1e-12)), float32=True
        ),
    )


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Read which layers are sparse: every `moe_layer_interval`-th between the first and the last index."""
    first, last = fields.get("moe_layer_start_index", 1), fields.get("moe_layer_end_index", -1)
    if type(first) is not int or type(last) is not int:
        raise UnsupportedConfig(
            f"expected whole moe_layer_start_index and end_index; config.json has {shown([first, last])}"
        )
    step, last = read_count([fields], "moe_layer_interval", 1), layers - 1 if last == -1 else last
    return tuple((i + 1) % step == 0 and first <= i <= last for i in range(layers))


def _write_ernie(config: DecoderConfig) -> dict[str, Any]:
    sparse = [i for i, is_sparse in enumerate(config.sparse_layers) if is_sparse] or [config.num_hidden_layers]
    return {
        "moe_k": config.num_experts_per_tok,
        "moe_num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_num_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size,
        "moe_norm_min": config.router.norm_min,
        "moe_layer_start_index": sparse[0],
        "moe_layer_end_index": sparse[-1],
        "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        "use_bias": False,
    }


ERNIE = Family(
    "Ernie4_5_MoeForCausalLM",
    _read_ernie,
    _write_ernie,
    TensorNames(correction="mlp.moe_statics.e_score_correction_bias", correction_row=True),
    mtp=True,
    neutral={"clip_qkv": (), "use_bias": (False,), "norm_topk_prob": (True,)},
)
