"""Sum and RMS norm of a few rows by one Triton kernel; for one row, XLA:GPU launches a sum, a reduction, a product."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from moespec_jax.nn.layers import LayerNorm, Norm, add_norm

# More rows XLA fuses by itself; wider ones do not fit the registers of a thread block.
MOST_ROWS, WIDEST = 64, 16384


def add_norm_gpu(
    x: Float[Array, "*batch model"], y: Float[Array, "*batch model"] | None, norm: Norm, eps: float
) -> tuple[Float[Array, "*batch model"], Float[Array, "*batch model"]]:
    """Compute `add_norm`: on NVIDIA GPUs with the kernel where rows are few and the norm is an RMS norm, elsewhere with
    plain operations."""
    if norm is None or isinstance(norm, LayerNorm) or x.size > MOST_ROWS * x.shape[-1] or x.shape[-1] > WIDEST:
        return add_norm(x, y, norm, eps)

    def fused(x: Array, y: Array | None, weight: Array) -> tuple[Array, Array]:
        total, normed = fused_add_norm([a.reshape(-1, a.shape[-1]) for a in (x, y) if a is not None], weight, eps)
        return total.reshape(x.shape), normed.reshape(x.shape)

    def plain(x: Array, y: Array | None, weight: Array) -> tuple[Array, Array]:
        return add_norm(x, y, weight, eps)

    return jax.lax.platform_dependent(x, y, norm, cuda=fused, default=plain)


def fused_add_norm(
    addends: list[Float[Array, "rows model"]], weight: Float[Array, " model"], eps: float, *, interpret: bool = False
) -> tuple[Float[Array, "rows model"], Float[Array, "rows model"]]:
    """Compute the sum of one or two addends, and its norm, with the kernel."""
    (rows, width), dtype = addends[0].shape, addends[0].dtype

    def kernel(*references):
        *addends, weight, total_out, norm_out = references
        row, column = pl.program_id(0), jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
        inside = column < width
        parts = [plgpu.load(part.at[row, column], mask=inside, other=0.0).astype(jnp.float32) for part in addends]
        total = sum(parts[1:], parts[0]).astype(dtype)
        plgpu.store(total_out.at[row, column], total, mask=inside)
        wide = total.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.sum(wide * wide, axis=0) / width + eps)
        factor = plgpu.load(weight.at[column], mask=inside, other=0.0)
        plgpu.store(norm_out.at[row, column], (wide * scale).astype(dtype) * factor, mask=inside)

    shape = jax.ShapeDtypeStruct((rows, width), dtype)
    return pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=(shape, shape),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(*addends, weight)
