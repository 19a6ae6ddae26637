"""The settings a decoder runs under, as frozen values that may cross `jit` as static arguments.

Field names are those of the published `config.json` wherever the thing is the same, so that a reader who knows
the checkpoint knows the setting. How each family's file is read is in `families.py`.
"""

import dataclasses
from typing import Literal

QkNorm = Literal["none", "head", "flat"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding and its published scalings (transformers' `rope_parameters`).

    `original_max_position_embeddings` is the context of pre-training where a scaling extends it; `dynamic`
    scaling measures against the decoder's own `max_position_embeddings`.
    """

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One Mixture-of-Experts decoder, whatever its family.

    `qk_norm` says what the query/key RMS norm runs over: nothing, each head (Qwen3), or all heads together
    (OLMoE). `sparse_layers[i]` is true where layer i routes to experts; `sliding_windows[i]` is layer i's attention
    window in tokens, 0 for full attention. `shared_expert_intermediate_size` is 0 where there is no shared expert.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    sparse_layers: tuple[bool, ...]
    sliding_windows: tuple[int, ...]
    rope: RopeConfig = RopeConfig()
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QkNorm = "none"
    clip_qkv: float | None = None
    shared_expert_intermediate_size: int = 0

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens. A rotary scaling extends what the model was trained on; files differ in
        whether `max_position_embeddings` already says so, and the larger reading counts."""
        rope, trained = self.rope, self.max_position_embeddings
        if rope.rope_type == "default":
            return trained
        original = rope.original_max_position_embeddings
        if rope.rope_type in ("yarn", "llama3") and original is not None:
            return max(trained, int(original * rope.factor))
        return max(trained, int(trained * rope.factor)) if rope.rope_type in ("linear", "dynamic") else trained

    @property
    def num_sparse_layers(self) -> int:
        """How many layers route to experts."""
        return sum(self.sparse_layers)
