"""The accepted rows of a tree, moved in the caches of all layers by one Triton kernel.

In plain operations these are a slice, a product and an update for keys and for values of every layer, a launch each.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from moespec_jax.nn.cache import Cache, keep_rows

# Arrays of one launch: the pointers of a launch have 4 KiB, and an array has two.
ARRAYS = 64


def keep_rows_gpu(cache: Cache, start: Int[Array, " batch"], rows: Int[Array, "batch kept"], window: int) -> Cache:
    """Compute `keep_rows`: on NVIDIA GPUs with the kernel where layers are apart, elsewhere with plain operations."""
    if not isinstance(cache.k, tuple):
        return keep_rows(cache, start, rows, window)

    def plain(cache: Cache, start: Array, rows: Array) -> Cache:
        return keep_rows(cache, start, rows, window)

    def fused(cache: Cache, start: Array, rows: Array) -> Cache:
        stores = (*cache.k, *cache.v)
        parts = [move_rows(stores[i : i + ARRAYS], start, rows) for i in range(0, len(stores), ARRAYS)]
        moved = tuple(store for part in parts for store in part)
        return Cache(moved[: len(cache.k)], moved[len(cache.k) :], cache.length)

    return jax.lax.platform_dependent(cache, start, rows, cuda=fused, default=plain)


def move_rows(
    stores: tuple[Float[Array, "batch kv_heads slots head"], ...],
    start: Int[Array, " batch"],
    rows: Int[Array, "batch kept"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "batch kv_heads slots head"], ...]:
    """Move rows `start[b] + rows[b]` of every array to its rows from `start[b]` on, in place where they are donated."""
    (batch, groups, slots, head), kept = stores[0].shape, rows.shape[1]

    def kernel(start, rows, *references):
        which, sequence, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        row = jnp.arange(pl.next_power_of_2(kept), dtype=jnp.int32)
        column = jnp.arange(pl.next_power_of_2(head), dtype=jnp.int32)
        first = start[sequence]
        source = first + plgpu.load(rows.at[sequence, row], mask=row < kept, other=0)
        inside = ((row < kept) & (first + row < slots))[:, None] & (column < head)[None, :]

        def move(store):
            old = plgpu.load(store.at[sequence, group, source[:, None], column[None, :]], mask=inside, other=0.0)
            if not interpret:
                plgpu.debug_barrier()  # all rows are read before one is written
            plgpu.store(store.at[sequence, group, (first + row)[:, None], column[None, :]], old, mask=inside)

        for i, store in enumerate(references[len(stores) :]):
            pl.when(which == i)(lambda store=store: move(store))

    return pl.pallas_call(
        kernel,
        grid=(len(stores), batch, groups),
        out_shape=tuple(jax.ShapeDtypeStruct(store.shape, store.dtype) for store in stores),
        input_output_aliases={2 + i: i for i in range(len(stores))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="keep_rows",
    )(start, rows, *stores)
