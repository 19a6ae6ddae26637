"""Forms of a layer's parts that settings of decoders and heads choose: rotary embedding, routers, activations."""

import dataclasses
from typing import Literal

QkNorm = Literal["none", "head", "rotated", "flat", "unit"]
OutputGate = Literal["none", "sigmoid", "softplus"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoPE) and its scalings, as transformers' `rope_parameters`.

    Fields:
        rope_type: kind of scaling.
        rope_theta: base of the frequencies.
        factor: ratio of the extended to the original context.
        original_max_position_embeddings: context of pre-training in tokens, for `yarn` and `llama3` (default, and
            always for `dynamic`: the model's `max_position_embeddings`), and for `longrope`.
        attention_factor: factor on cosine and sine for `yarn` (default: computed from `factor` and the mscales).
        beta_fast: rotations over the original context above which `yarn` keeps a frequency.
        beta_slow: rotations over the original context below which `yarn` divides a frequency by `factor`.
        mscale: weight in the numerator of the default attention factor of `yarn`.
        mscale_all_dim: weight in its denominator.
        truncate: whether `yarn` rounds the bounds of its ramp to whole dimensions.
        low_freq_factor: `llama3` divides frequencies of fewer rotations over the original context by `factor`.
        high_freq_factor: `llama3` keeps frequencies of more rotations over the original context.
        partial_rotary_factor: share of each head, from its first dimension, that is rotated.
        short_factor, long_factor: divisors of each frequency for `longrope`, up to the original context and beyond.
        short_mscale, long_mscale: factors on cosine and sine for `longrope`, likewise.
        interleaved: whether the rotated pairs are of neighbouring dimensions instead of those half the width apart.
    """

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
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
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float = 1.0
    long_mscale: float = 1.0
    interleaved: bool = False

    def rotary_dim(self, head_dim: int) -> int:
        """Number of dimensions of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Computation of the experts of a token and their combine weights from the router's logits.

    Fields:
        score: weight of an expert before renormalisation: `softmax` over all experts, `sigmoid` of its own logit, or
            `sparsemixer` (`nn.routing.sparsemixer_gates`).
        jitter: of sparsemixer, half the largest relative distance of a logit to the best at which its expert takes part
            in the sum of shares.
        correction: whether a learned number is added to the score of each expert for the choice, and not to its weight.
        groups: number of equal groups of consecutive experts.
        groups_per_tok: number of groups from which a token may choose; a group counts the sum of its two best scores.
        scale: factor on combine weights.
        norm_epsilon: number added to the sum by which combine weights are renormalised.
        norm_min: least sum by which they are renormalised.
        softcap: bound to which logits are squashed, by `softcap` · tanh(logit / `softcap`), before they are scores;
            0 for none.
        scales_input: whether a combine weight multiplies the input of its expert, instead of the output.
        float32: whether router and correction are kept in float32 at any dtype of the other parameters.
    """

    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    jitter: float = 0.0
    correction: bool = False
    groups: int = 1
    groups_per_tok: int = 1
    scale: float = 1.0
    norm_epsilon: float = 0.0
    norm_min: float = 0.0
    softcap: float = 0.0
    scales_input: bool = False
    float32: bool = False

    @property
    def ranks_by_probability(self) -> bool:
        """Whether experts are ranked and weighed by their probabilities alone."""
        return dataclasses.replace(self, float32=False, softcap=0.0, scales_input=False) == RouterConfig()


@dataclasses.dataclass(frozen=True)
class ClampedSwiglu:
    """Activation of gpt-oss's experts: (up + 1) · g · sigmoid(alpha · g), with g = min(gate, limit) and `up` clamped to
    ± `limit`."""

    alpha: float = 1.702
    limit: float = 7.0

    def __str__(self) -> str:
        return "clamped SwiGLU"


@dataclasses.dataclass(frozen=True)
class QueryScale:
    """Factor on the queries of layers without rotary embedding (Llama-4's temperature): for the token at position p,
    1 + `scale` · log(1 + ⌊(p + 1) / `step`⌋)."""

    scale: float
    step: float


# Activation of gated MLPs: a name in `nn.layers.ACTIVATIONS` of a function of the gate, or a function of both products.
Activation = str | ClampedSwiglu
