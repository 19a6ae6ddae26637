"""Expert compute for CPU: `lax.switch` over per-expert arrays, so that no weight is ever sliced and thereby copied.

One token runs its k experts one after another. More tokens run in 16-row blocks of rows sorted by expert, and from
`PREFILL_TOKENS` on in 64-row blocks with 16-row remainders; those sizes measured fastest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moespec_jax.experts.blocks import RunExpert, run_blocks
from moespec_jax.experts.layouts import PerExpert
from moespec_jax.layers import GatedMlp, gated_mlp
from moespec_jax.moe import ExpertCompute, Routing

PREFILL_TOKENS = 128
BLOCK, LARGE_BLOCK = 16, 64


def cpu_experts(activation: str) -> ExpertCompute:
    """Expert compute over the `PerExpert` layout; the layer must be known at trace time (unrolled layers)."""

    def compute(experts: object, layer: int | Array, x: Array, routing: Routing) -> Array:
        assert isinstance(experts, tuple) and isinstance(layer, int)
        run = _switch(experts, layer, activation)
        if x.shape[0] == 1:
            return _one_token(x, routing, len(experts[layer]), run)
        large = LARGE_BLOCK if x.shape[0] >= PREFILL_TOKENS else 0
        return run_blocks(x, routing, len(experts[layer]), run, BLOCK, large)

    return compute


def _switch(experts: PerExpert, layer: int, activation: str) -> RunExpert:
    def branch(expert: GatedMlp, rows: Array) -> Array:
        return gated_mlp(rows, expert, activation).astype(jnp.float32)

    branches = [partial(branch, expert) for expert in experts[layer]]
    return lambda rows, expert: jax.lax.switch(expert, branches, rows)


def _one_token(x: Array, routing: Routing, num_experts: int, run: RunExpert) -> Array:
    """A single row: a loop over its k experts. A row that routes to nobody runs none of them.

    bfloat16 rows are doubled: XLA:CPU converts whole weight matrices to float32 for a one-row product.
    """
    rows = jnp.concatenate([x, x]) if x.dtype == jnp.bfloat16 else x

    def body(i: Array, total: Array) -> Array:
        return total + run(rows, routing.experts[0, i])[:1] * routing.weights[0, i]

    k = jnp.where(routing.experts[0, 0] < num_experts, routing.experts.shape[1], 0)
    return jax.lax.fori_loop(0, k, body, jnp.zeros(x.shape, jnp.float32))
