"""One plain forward pass of the target over whole texts, with a cache of its own that is dropped afterwards."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import DecoderConfig
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder, ForwardInfo, forward


def plain_pass(
    config: DecoderConfig,
    backend: Backend,
    params: Decoder,
    texts: Int[Array, "texts tokens"],
    *,
    lengths: Int[Array, " texts"] | None = None,
    boundaries: tuple[int, ...] = (),
) -> tuple[Float[Array, "texts tokens model"], ForwardInfo]:
    """Read texts from their first token on; returns the hidden states after the last norm, and intermediate results.

    Args:
        config: the decoder's settings.
        backend: expert compute and attention.
        params: the decoder's parameters; on a mesh, a device's shard of them.
        texts: token ids.
        lengths: number of tokens of each text; later ones are padding (default: there is none).
        boundaries: as in `decoder.forward`.
    """
    batch, slots = texts.shape
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :], texts.shape)
    cache = empty_cache(
        config, batch, slots, params.embed.dtype, stacked=params.stacked, heads=params.sharding.heads
    )  # fmt: skip
    valid = rope_length = None
    if lengths is not None:
        valid, rope_length = positions < lengths[:, None], jnp.broadcast_to(lengths[:, None], texts.shape)
    hidden, _, info = forward(
        config, params, texts, positions, causal_mask(positions, slots), cache, backend,
        valid=valid, rope_length=rope_length, boundaries=boundaries,
    )  # fmt: skip
    return hidden, info
