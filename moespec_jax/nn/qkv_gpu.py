"""Queries, keys and values of a few tokens by one product and one Triton kernel: norms, clipping and rotation, and the
rows of keys and values written into the cache. In plain operations these are five launches after the product.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from moespec_jax.config import AttentionConfig
from moespec_jax.nn.attention import Attention, output_projection, write_qkv
from moespec_jax.nn.experts.gpu import DTYPES
from moespec_jax.parallel.collectives import psum
from moespec_jax.parallel.mesh import Axes

# Parts into which one token's product is split along the summed axis (split-K).
PARTS = 16
# More tokens (a prompt) take plain operations; wider rows do not fit the registers of a thread block.
MOST_TOKENS, WIDEST = 64, 16384


def write_qkv_gpu(
    config: AttentionConfig,
    weights: Attention,
    x: Float[Array, "batch tokens inputs"],
    angles: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    kv: tuple[Float[Array, "*layers batch kv_heads slots head"], Float[Array, "*layers batch kv_heads slots head"]],
    start: Int[Array, " batch"],
    layer: Int[Array, ""] | None = None,
    axes: Axes = (),
) -> tuple[Array, tuple[Array, Array]]:
    """Compute `write_qkv`: on NVIDIA GPUs with the kernel where tokens are few, numbers have 16 bits, layers are apart,
    heads are not sharded, rotated whole and by halves; elsewhere with plain operations."""

    def plain(weights: Attention, x: Array, angles: tuple[Array, Array], kv: tuple[Array, Array], start: Array):
        return write_qkv(config, weights, x, angles, kv, start, layer, axes)

    def fused(weights: Attention, x: Array, angles: tuple[Array, Array], kv: tuple[Array, Array], start: Array):
        return fused_qkv(config, weights, x, angles, kv, start)

    few = layer is None and not axes and x.shape[1] <= MOST_TOKENS and weights.q.shape[0] <= WIDEST
    half = config.head_dim // 2
    usual = angles[0].shape[-1] == half and not config.rope.interleaved and config.qk_norm not in ("rotated", "unit")
    dtypes = x.dtype in DTYPES and x.dtype == weights.q.dtype == kv[0].dtype
    if not (few and usual and dtypes) or half & (half - 1):
        return plain(weights, x, angles, kv, start)
    return jax.lax.platform_dependent(weights, x, angles, kv, start, cuda=fused, default=plain)


def output_projection_gpu(
    weights: Attention, x: Float[Array, "batch tokens q_out"], axes: Axes = ()
) -> Float[Array, "batch tokens model"]:
    """Compute `output_projection`. For one token, XLA:GPU may write the elementwise product of matrix and token to
    memory before it sums; in parts of the summed axis it does not."""
    batch, tokens, width = x.shape
    if batch * tokens > 1 or width % PARTS or weights.o_bias is not None:
        return output_projection(weights, x, axes)

    def split(x: Array, o: Array) -> Array:
        parts, matrix = x.reshape(1, PARTS, -1), o.reshape(PARTS, -1, o.shape[1])
        sums = jnp.einsum("tsd,sdf->stf", parts, matrix, preferred_element_type=jnp.float32)
        # Without a barrier, the compiler merges both sums into one.
        return jnp.sum(jax.lax.optimization_barrier(sums), axis=0)[None].astype(x.dtype)

    return psum(jax.lax.platform_dependent(x, weights.o, cuda=split, default=lambda x, o: x @ o), axes)


def fused_qkv(
    config: AttentionConfig,
    weights: Attention,
    x: Float[Array, "batch tokens inputs"],
    angles: tuple[Float[Array, "batch tokens half"], Float[Array, "batch tokens half"]],
    kv: tuple[Float[Array, "batch kv_heads slots head"], Float[Array, "batch kv_heads slots head"]],
    start: Int[Array, " batch"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch tokens heads head"], tuple[Array, Array]]:
    """Compute `write_qkv` with one product and the kernel."""
    (batch, tokens, _), (groups, slots, head) = x.shape, kv[0].shape[1:]
    half, heads = head // 2, len(weights.q) // head
    norms = [norm for norm in (weights.q_norm, weights.k_norm) if norm is not None]

    def kernel(products, cos, sin, start, *references):
        *norms, _, _, q_out, k_out, v_out = references
        token, column = pl.program_id(0), jnp.arange(half, dtype=jnp.int32)
        sequence = jax.lax.div(token, tokens)
        slot = start[sequence] + jax.lax.rem(token, tokens)
        c, s = (angle[token, :].astype(x.dtype).astype(jnp.float32)[None, :] for angle in (cos, sin))

        def halves(first: int, count: int, norm):
            """Load heads from column `first` on as two halves, normed and clipped as `project_qkv` does."""
            nth = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)[:, None]
            places = [nth * head + part * half + column[None, :] for part in (0, 1)]
            parts = [plgpu.load(products.at[token, first + p], mask=nth < count, other=0.0) for p in places]
            if norm is not None and config.qk_norm == "flat":
                factors = [plgpu.load(norm.at[p], mask=nth < count, other=0.0) for p in places]
                parts = _normed(parts, factors, 1.0 / (count * head), config.rms_norm_eps, flat=True)
            if config.clip_qkv is not None:
                parts = [jnp.minimum(jnp.maximum(part, -config.clip_qkv), config.clip_qkv) for part in parts]
            if norm is not None and config.qk_norm == "head":
                factors = [norm[pl.ds(part * half, half)][None, :] for part in (0, 1)]
                parts = _normed(parts, factors, 1.0 / head, config.rms_norm_eps, flat=False)
            return nth, parts

        def rotated(parts):
            a, b = (part.astype(jnp.float32) for part in parts)
            return [(a * c - b * s).astype(x.dtype), (b * c + a * s).astype(x.dtype)]

        q_norm, k_norm = norms or (None, None)
        nth, parts = halves(0, heads, q_norm)
        for part, values in enumerate(rotated(parts)):
            plgpu.store(q_out.at[token, nth, part * half + column[None, :]], values, mask=nth < heads)
        for first, norm, finish, out in (
            (heads * head, k_norm, rotated, k_out),
            ((heads + groups) * head, None, lambda parts: parts, v_out),
        ):
            nth, parts = halves(first, groups, norm)
            for part, values in enumerate(finish(parts)):
                target = out.at[sequence, nth, slot, part * half + column[None, :]]
                plgpu.store(target, values, mask=(nth < groups) & (slot < slots))

    shapes = ((batch * tokens, heads, head), kv[0].shape, kv[1].shape)
    q, k, v = pl.pallas_call(
        kernel,
        grid=(batch * tokens,),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes),
        input_output_aliases={4 + len(norms): 1, 5 + len(norms): 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_qkv",
    )(
        _products(weights, x).reshape(batch * tokens, -1),
        *(jnp.broadcast_to(a, (batch, tokens, half)).reshape(-1, half) for a in angles),
        start,
        *norms,
        *kv,
    )
    return q.reshape(batch, tokens, heads, head), (k, v)


def _products(weights: Attention, x: Float[Array, "batch tokens inputs"]) -> Float[Array, "batch tokens outputs"]:
    """Compute queries, keys and values side by side. XLA reads the parts of a concatenation inside the product."""
    products = jnp.einsum("btm,om->bto", x, jnp.concatenate([weights.q, weights.k, weights.v]))
    biases = [bias for bias in (weights.q_bias, weights.k_bias, weights.v_bias) if bias is not None]
    return products + jnp.concatenate(biases)[None, None, :] if biases else products


def _normed(parts: list[Array], factors: list[Array], share: float, eps: float, *, flat: bool) -> list[Array]:
    """Compute `rms_norm` over both halves, of every head or of all."""
    wide = [part.astype(jnp.float32) for part in parts]
    squares = jnp.sum(wide[0] * wide[0], axis=1) + jnp.sum(wide[1] * wide[1], axis=1)
    scale = jax.lax.rsqrt((jnp.sum(squares, axis=0) if flat else squares[:, None]) * share + eps)
    return [(part * scale).astype(parts[0].dtype) * factor for part, factor in zip(wide, factors, strict=True)]
