"""Fields of a target's `config.json` that change what is computed and that no family here has, each refused by name.

Tensors show most differences of an architecture: an unknown or missing one is refused. These fields leave no trace in
the tensors, and would otherwise be read over.
"""

from collections.abc import Mapping
from typing import Any

from moespec_jax.checkpoint.config_fields import Fields, shown
from moespec_jax.errors import UnsupportedConfig

_LATENT, _LINEAR = "multi-head latent attention (MLA)", "layers of linear attention"
_STATE_SPACE, _SPARSE = "state-space layers", "sparse attention by an indexer"
# Model types of MoE families that are refused, and why.
UNSUPPORTED_FAMILIES = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "kimi_k2": _LATENT,
    "glm4_moe_lite": _LATENT,
    "longcat_flash": _LATENT,
    "mistral4": _LATENT,
    "axk1": _LATENT,
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "qwen3_next": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "minimax": _LINEAR,
    "kimi_linear": _LINEAR,
    "bailing_hybrid": _LINEAR,
    "nemotron_h": _STATE_SPACE,
    "granitemoehybrid": _STATE_SPACE,
    "jamba": _STATE_SPACE,
    "lfm2_moe": "layers of convolutions",
    "dbrx": "fused projections with layer norms of its own",
}

# For each field the values that change nothing; null counts as absent.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # attention
    "dual_chunk_attention_config": ({},),
    "sparse_attention_config": ({},),
    "attention_chunk_size": (0,),
    "attention_window": (0,),
    "window_size": (0,),
    "sliding_window_size": (0,),
    "sliding_window_pattern": (0,),
    "attn_logit_softcapping": (0,),
    "attention_softcap": (0,),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1,),
    "attn_temperature_tuning": (0,),
    "use_logn_attn": (False,),
    "use_bidirectional_attention": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    # positions
    "alibi": (False,),
    "use_alibi": (False,),
    "rotary_pct": (1,),
    "rotary_emb_fraction": (1,),
    "rotary_dim": (),
    "rotary_base": (),
    "rotary_emb_base": (),
    "rope_base": (),
    "rope_ratio": (1,),
    "rope_local_base_freq": (),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "use_dynamic_ntk": (False,),
    "use_rope": (True,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    # residual stream and logits
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "output_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "scale_embedding": (False, 1),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "final_logit_softcapping": (0,),
    "logits_soft_cap": (0,),
    "use_parallel_residual": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    # experts
    "scoring_func": ("softmax",),
    "score_function": ("softmax",),
    "routed_scaling_factor": (1,),
    "router_scaling_factor": (1,),
    "route_scale": (1,),
    "topk_method": ("greedy",),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "router_logit_softcapping": (0,),
    "swiglu_limit": (0,),
    "swiglu_alpha": (1,),
    "zero_expert_num": (0,),
    # weights
    "quantization": ({},),
}


def check_neutral(fields: Fields, of_family: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that would be read over; `of_family` are those of one family, which have precedence.

    Raises:
        UnsupportedConfig: a field has a value that changes what is computed; the message names both.
    """
    neutral = _NEUTRAL | dict(of_family)
    neutral |= {"hidden_activation": (fields.get("hidden_act", "silu"),)}
    for name, values in neutral.items():
        if fields.get(name) is not None and fields[name] not in values:
            raise UnsupportedConfig(f"{name} is not supported: expected none; config.json has {shown(fields[name])}")
