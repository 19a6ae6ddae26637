"""Settings of decoders, draft heads and draft trees: frozen dataclasses, hashable, so that `jit` accepts them as
static arguments.

Fields that a published `config.json` has too bear its names. `checkpoint/families/` reads that file for each family.
"""

import dataclasses
from numbers import Integral
from typing import Protocol, runtime_checkable

from moespec_jax.errors import wrong_type
from moespec_jax.forms import Activation, ClampedSwiglu, OutputGate, QkNorm, QueryScale, RopeConfig, RouterConfig


@runtime_checkable
class AttentionConfig(Protocol):
    """Settings of attention, which decoders and draft heads share."""

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
    @property
    def rope(self) -> RopeConfig: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Settings of a Mixture-of-Experts decoder of any family. Fields not listed are as in `config.json`.

    Fields:
        intermediate_size: ffn width of dense layers.
        moe_intermediate_size: ffn width of a routed expert.
        num_experts: routed experts of a sparse layer.
        num_experts_per_tok: k, the number of experts of a token.
        sparse_layers: for each layer, whether it routes to experts.
        sliding_windows: attention window of each layer in tokens, 0 for full attention.
        norm_topk_prob: whether combine weights are renormalised over the k experts of a token.
        qk_norm: RMS norm of queries and keys: `none`, over each `head` (Qwen3), over each head after
            it is `rotated` (HunYuan), `flat` over all heads (OLMoE), or of `unit` weight over each rotated head of
            layers with rotary embedding (Llama-4).
        clip_qkv: bound on the absolute value of queries, keys and values; None for none.
        shared_expert_intermediate_size: ffn width of the shared expert, 0 where there is none. Several are one of their
            widths together.
        sliding_rope: rotary embedding of layers with a window, where it is not `rope`.
        rope_layers: for each layer, whether it has rotary embedding; empty where all have.
        attention_chunks: for each layer, the tokens of a chunk, within which it attends, 0 for all; empty for none.
        layer_heads: for each layer, its number of query heads; empty where all have `num_attention_heads`.
        query_scale: factor on the queries of layers without rotary embedding.
        output_gate: function of a projection of a layer's input, by which the heads' outputs are multiplied.
        output_gate_per_head: whether a head has one gate, instead of one for each number.
        input_norms: whether the inputs of both blocks of a layer are normed.
        output_norms: whether the outputs of both blocks of a layer are normed before they are added (AFMoE, FlexOlmo).
        layer_norms: whether norms of the residual stream subtract the mean and have a bias (LayerNorm), in place of RMS
            norms (Phi-3.5-MoE).
        lm_head_bias: whether logits have a bias.
        attention_sinks: whether every head has a sink: a learned score beside those of the tokens, without a value.
        router_bias: whether the router's logits have a bias.
        expert_bias: whether the matrices of routed experts have biases.
        embedding_multiplier: factor on the embedding of every token.
        clamped_swiglu: activation of routed experts in place of `hidden_act`; None for `hidden_act`.
        shared_expert_gate: whether the shared expert's output is multiplied by a gate.
        router: how experts are chosen and weighed.
        attention_multiplier: factor on the scores of attention; None for 1 / √head_dim.
        residual_multiplier: factor on the outputs of both blocks of a layer.
        logits_scaling: divisor of logits.
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
    sliding_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()
    attention_chunks: tuple[int, ...] = ()
    layer_heads: tuple[int, ...] = ()
    query_scale: QueryScale | None = None
    output_gate: OutputGate = "none"
    output_gate_per_head: bool = False
    input_norms: bool = True
    output_norms: bool = False
    layer_norms: bool = False
    lm_head_bias: bool = False
    attention_sinks: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    clamped_swiglu: ClampedSwiglu | None = None
    embedding_multiplier: float = 1.0
    shared_expert_gate: bool = True
    router: RouterConfig = RouterConfig()
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @property
    def layer_ropes(self) -> tuple[RopeConfig | None, ...]:
        """Rotary embedding of every layer."""
        rotates = self.rope_layers or (True,) * self.num_hidden_layers
        local = self.rope if self.sliding_rope is None else self.sliding_rope
        pairs = zip(rotates, self.sliding_windows, strict=True)
        return tuple((local if window else self.rope) if rotated else None for rotated, window in pairs)

    def heads_of(self, layer: int) -> int:
        """Number of a layer's query heads."""
        return self.layer_heads[layer] if self.layer_heads else self.num_attention_heads

    @property
    def expert_activation(self) -> Activation:
        """Activation of routed experts."""
        return self.hidden_act if self.clamped_swiglu is None else self.clamped_swiglu

    @property
    def context_length(self) -> int:
        """Largest length of a sequence in tokens. A RoPE scaling extends the trained context. Some files include the
        extension in `max_position_embeddings` and some do not: of the two readings the larger is returned. Of
        `longrope` it is the original one: beyond it, all positions of a sequence would rotate by other factors."""
        rope, trained = self.rope, self.max_position_embeddings
        if rope.rope_type == "default":
            return trained
        original = rope.original_max_position_embeddings
        if rope.rope_type == "longrope" and original is not None:
            return min(trained, original)
        if rope.rope_type in ("yarn", "llama3") and original is not None:
            return max(trained, int(original * rope.factor))
        return max(trained, int(trained * rope.factor)) if rope.rope_type in ("linear", "dynamic") else trained

    @property
    def num_sparse_layers(self) -> int:
        """Number of layers that route to experts."""
        return sum(self.sparse_layers)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Settings of an EAGLE-3 draft head (arXiv:2503.01840): one Llama-style layer, in rare cases more, over auxiliary
    hidden states of the target. Fields not listed are as in `config.json`.

    Fields:
        vocab_size: size of the target's vocabulary.
        draft_vocab_size: size of the draft vocabulary, a subset of the target's.
        target_hidden_size: width of each auxiliary hidden state.
        boundaries: boundaries of the target whose hidden states the head reads, ascending: boundary b is the residual
            stream that enters layer b; the target's number of layers stands for the output of its last one.
        norm_before_residual: whether the residual stream starts from the normed feature instead of the feature.
        norm_before_fc: whether one norm over all auxiliary hidden states together precedes `fc`.
        fc_norm: whether a norm for each auxiliary hidden state precedes `fc` (EAGLE-3.1).
        norm_output: whether the next draft step reads the normed output instead of the output (EAGLE-3.1).
        own_embedding: whether the head has an embedding of its own, of its own width, in place of the target's.
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
        """None: no draft head clips queries, keys or values."""
        return None

    @property
    def aux_size(self) -> int:
        """Width of the concatenated auxiliary hidden states."""
        return len(self.boundaries) * self.target_hidden_size


# Far above every size at which a tree saves time; a verification's memory grows with the square of the size.
_LARGEST_TREE, _MOST_CANDIDATES = 1 << 10, 1 << 16


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """Shape of a draft tree.

    Fields:
        depth: number of times that the beam is expanded after the first level (EAGLE's argument of that name); nodes
            reach depth `depth + 1`.
        top_k: width of the beam, and number of children of each of its nodes; 1 makes a chain.
        size: number of tokens verified at once, the root included (EAGLE's `total_token`).

    Raises:
        ValueError: a number is out of range, or the candidates are too few for `size`.
    """

    depth: int = 7
    top_k: int = 10
    size: int = 60

    def __post_init__(self) -> None:
        for name in ("depth", "top_k", "size"):
            if not isinstance(getattr(self, name), Integral):
                raise wrong_type(f"{name} of a tree", "a whole number", getattr(self, name))
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

    @classmethod
    def of_name(cls, name: str) -> "TreeConfig":
        """Parse size, depth and top-k, as `name` writes them.

        Raises:
            ValueError: it has another form, or the tree is invalid.
        """
        size, depth, top_k = (int(part) for part in name.split("/"))
        return cls(depth, top_k, size)

    @property
    def name(self) -> str:
        """Size, depth and top-k, such as `60/7/10`."""
        return f"{self.size}/{self.depth}/{self.top_k}"

    @property
    def pool(self) -> int:
        """Number of drafted nodes, of which the best `size - 1` are kept."""
        return self.top_k + self.depth * self.top_k**2

    @property
    def longest_path(self) -> int:
        """Largest number of nodes on a path, the root included; also the largest number of tokens a round can gain."""
        return min(self.depth + 2, self.size)
