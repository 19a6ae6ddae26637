"""Hidden states of the target that wait until a draft head reads them: those of the newest tokens, which the last round
committed, or several rounds of plain decoding in a row (`drafter.Drafter.commit` and `skip`)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.accept import Accepted


def keep_path(
    waiting: Float[Array, "batch rows aux"], accepted: Accepted, aux_hidden_states: Float[Array, "batch nodes aux"]
) -> Float[Array, "batch rows aux"]:
    """Replace what waits by the hidden states of the accepted path."""
    aux = jnp.take_along_axis(aux_hidden_states, accepted.path[:, :, None], axis=1)
    # Longer where other shapes of a menu have longer paths.
    return jnp.pad(aux, ((0, 0), (0, waiting.shape[1] - aux.shape[1]), (0, 0)))


def append_row(
    waiting: Float[Array, "batch rows aux"], count: Int[Array, " batch"], row: Float[Array, "batch 1 aux"]
) -> tuple[Float[Array, "batch rows aux"], Int[Array, " batch"]]:
    """Append a row to the first `count[b]`; where there is no room, the oldest is dropped, which is counted too."""
    width = waiting.shape[1]
    is_full = count >= width
    waiting = jnp.where(is_full[:, None, None], jnp.roll(waiting, -1, axis=1), waiting)
    is_new = jnp.arange(width, dtype=jnp.int32)[None, :] == jnp.minimum(count, width - 1)[:, None]
    return jnp.where(is_new[:, :, None], row, waiting), is_full.astype(jnp.int32)
