"""Shape of the embedded target, and its initial parameters."""

import jax
import jax.numpy as jnp

from moespec_jax.config import DecoderConfig, RopeConfig
from moespec_jax.nn.attention import Attention
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.experts.capacity import ExpertStack
from moespec_jax.nn.layer_blocks import Layer
from moespec_jax.nn.moe import SparseMlp

LAYERS = 4
CONFIG = DecoderConfig(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=1024,
    sparse_layers=(True,) * LAYERS,
    sliding_windows=(0,) * LAYERS,
    rope=RopeConfig(rope_theta=10_000.0),
    norm_topk_prob=True,
    tie_word_embeddings=True,
    qk_norm="head",
)


def init_params(config: DecoderConfig, key: jax.Array) -> Decoder:
    """Draw initial parameters in float32; matrices whose output is added to the residual stream are zero."""
    d, h, f, n = config.hidden_size, config.head_dim, config.moe_intermediate_size, config.num_experts
    q, kv = config.num_attention_heads * h, config.num_key_value_heads * h
    keys = iter(jax.random.split(key, 7 * config.num_hidden_layers + 1))

    def normal(*shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32) * 0.6 * fan_in**-0.5

    def layer() -> Layer:
        attention = Attention(
            q=normal(q, d, fan_in=d), k=normal(kv, d, fan_in=d), v=normal(kv, d, fan_in=d), o=jnp.zeros((q, d)),
            q_norm=jnp.ones(h), k_norm=jnp.ones(h),
        )  # fmt: skip
        return Layer(jnp.ones(d), attention, jnp.ones(d), SparseMlp(router=normal(n, d, fan_in=d) * 0.5))

    def experts() -> ExpertStack:
        return ExpertStack(normal(n, d, f, fan_in=d), normal(n, d, f, fan_in=d), jnp.zeros((n, f, d)))

    embed = jax.random.normal(next(keys), (config.vocab_size, d), jnp.float32) * 0.02
    layers = tuple(layer() for _ in range(config.num_hidden_layers))
    return Decoder(embed, layers, tuple(experts() for _ in layers), jnp.ones(d), None)
