"""The settings a decoder runs under, as frozen values that may cross `jit` as static arguments.

Field names are those of the published `config.json` wherever the thing is the same, so that a reader who knows
the checkpoint knows the setting. How each family's file is read is in `families.py`.
"""

import dataclasses
from typing import Literal, Protocol

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


class AttentionConfig(Protocol):
    """What attention needs to know of a decoder, or of a draft head."""

    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def num_key_value_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def rms_norm_eps(self) -> float: ...  # noqa: D102
    @property
    def qk_norm(self) -> QkNorm: ...  # noqa: D102
    @property
    def clip_qkv(self) -> float | None: ...  # noqa: D102


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


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """An EAGLE-3 draft head (arXiv:2503.01840): one Llama-style layer, seldom more, over states tapped from the target.

    `boundaries` name the tapped states from low to high: boundary b is the target's residual stream entering layer b,
    and `num_hidden_layers` of the target is what its last layer leaves. `target_hidden_size` is their width each,
    `vocab_size` the target's vocabulary, of which the head knows `draft_vocab_size` tokens. The variants that change
    numbers:

    - `norm_before_residual`: the residual stream starts from the normed feature, not from the feature itself.
    - `norm_before_fc`: one norm over all tapped states together before `fc`.
    - `fc_norm`: one norm for each tapped state before `fc` (EAGLE-3.1).
    - `norm_output`: the next draft step is fed the normed output, not the output itself (EAGLE-3.1).
    - `own_embedding`: the head brings an embedding of its own width instead of sharing the target's.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    boundaries: tuple[int, ...]
    num_hidden_layers: int = 1
    max_position_embeddings: int = 2048
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    qk_norm: QkNorm = "none"
    attention_bias: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    own_embedding: bool = False

    @property
    def clip_qkv(self) -> None:
        """No head clips."""
        return None

    @property
    def aux_size(self) -> int:
        """Width of all tapped states side by side."""
        return len(self.boundaries) * self.target_hidden_size


# Far above every tree that pays; a pass over the tree takes memory in the square of its size.
_LARGEST_TREE, _MOST_CANDIDATES = 1 << 10, 1 << 16


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """Shape of the draft tree: `size` tokens are verified at once, the root included (EAGLE's `total_token`).

    `depth` is EAGLE's argument of that name: the beam is expanded so many times after the first level, so nodes reach
    depth `depth + 1`. `top_k` is the width of the beam and the number of children of each of its nodes; 1 is a chain.

    Raises:
        ValueError: a number is out of range, or the candidates are too few for `size`.
    """

    depth: int = 7
    top_k: int = 10
    size: int = 60

    def __post_init__(self) -> None:
        if self.depth < 0 or self.top_k < 1 or self.size < 2:
            raise ValueError(
                "expected a tree of depth at least 0, top-k at least 1 and size at least 2;"
                f" got depth {self.depth}, top-k {self.top_k}, size {self.size}"
            )
        if self.size > _LARGEST_TREE or self.pool > _MOST_CANDIDATES:
            raise ValueError(
                f"expected a tree of at most {_LARGEST_TREE} tokens, the best of at most {_MOST_CANDIDATES} drafted"
                f" ones; got size {self.size}, depth {self.depth}, top-k {self.top_k}"
            )
        if self.size - 1 > self.pool:
            raise ValueError(
                f"expected a tree size of at most {self.pool + 1}, which is what depth {self.depth} and top-k"
                f" {self.top_k} can draft with the root; got {self.size}"
            )

    @property
    def name(self) -> str:
        """`60/7/10`: size, depth and top-k."""
        return f"{self.size}/{self.depth}/{self.top_k}"

    @property
    def pool(self) -> int:
        """Number of nodes that are drafted, of which the best `size - 1` are kept."""
        return self.top_k + self.depth * self.top_k**2

    @property
    def longest_path(self) -> int:
        """Largest number of nodes on a path, the root included; also the largest number of tokens a round can gain."""
        return min(self.depth + 2, self.size)
