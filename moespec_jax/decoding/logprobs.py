"""Log-probabilities of generated tokens: the log-softmax of the target's logits that each was drawn from, before a
processor, penalties, temperature and cuts. They are of the pass that drew the token; there is no second one."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.slots import write_slots
from moespec_jax.nn.summary import summary
from moespec_jax.nn.top_k import top_k


@struct.dataclass
class Logprobs:
    """Log-probabilities at every slot of a batch of sequences, in nats; without meaning where no token was generated.

    Fields:
        token: of the token in the slot.
        top: of the most probable tokens there, best first.
        top_ids: ids of these; lower ids first among equals.
    """

    token: Float[Array, "batch slots"]
    top: Float[Array, "batch slots alternatives"]
    top_ids: Int[Array, "batch slots alternatives"]

    __repr__ = summary


def no_logprobs(tokens: Int[Array, "batch slots"], alternatives: int) -> Logprobs:
    """Allocate those of a buffer of tokens, with so many most probable tokens at each slot."""
    shape = (*tokens.shape, alternatives)
    zeros = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    return Logprobs(*zeros, jnp.zeros(shape, jnp.int32))


def record(
    logprobs: Logprobs,
    drawn: Int[Array, "batch path"],
    logits: Float[Array, "batch path vocab"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> Logprobs:
    """Record the first `count[b]` of the tokens `drawn[b]`, each from the logits of its place, from slot `start[b]`
    on."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    token = jnp.take_along_axis(log_p, drawn[..., None], axis=-1)[..., 0]
    top, top_ids = top_k(log_p, logprobs.top.shape[-1])
    new = Logprobs(token, top, top_ids)
    return jax.tree.map(lambda slots, rows: write_slots(slots, rows, start, count), logprobs, new)
