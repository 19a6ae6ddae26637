"""Training against repetition loops (DITTO: Xu et al., arXiv:2206.02369): greedy text of a small model ends in loops,
since each repetition of a passage makes the next one more probable.

Some rows of a batch are a passage of the text, of which the last tokens are repeated to the end of the row. There the
target of a token's probability is a fraction of its probability one repetition before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Target of a probability, relative to that of one repetition before.
DECAY = 0.5
SHORTEST, LONGEST = 2, 96


class Batch(NamedTuple):
    """Rows of one step.

    Fields:
        tokens: ids, `[rows, length + 1]`.
        period: number of tokens that a row repeats, `[rows]`; 0 for ordinary text.
        begin: index of the first token that is repeated, `[rows]`; the first repetition begins at `begin + period`.
    """

    tokens: Int[np.ndarray, "rows width"] | Int[Array, "rows width"]
    period: Int[np.ndarray, " rows"] | Int[Array, " rows"]
    begin: Int[np.ndarray, " rows"] | Int[Array, " rows"]


def repeated(tokens: np.ndarray, count: int, random: np.random.Generator) -> Batch:
    """Make a batch of rows of text, of which the first `count` repeat a passage of themselves. Lengths of passages are
    distributed uniformly in their logarithm."""
    rows, width = tokens.shape
    tokens, period, begin = tokens.copy(), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row in range(count):
        period[row] = round(np.exp(random.uniform(np.log(SHORTEST), np.log(LONGEST))))
        begin[row] = random.integers(width // 2 - period[row])
        index = np.arange(begin[row], width)
        tokens[row, index] = tokens[row, begin[row] + (index - begin[row]) % period[row]]
    return Batch(tokens, period, begin)


def loss_with_repetition(
    log_probabilities: Float[Array, "rows length"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the loss from the log-probabilities of the tokens `batch.tokens[:, 1:]`.

    Returns:
        The mean loss: cross-entropy of ordinary tokens, -log(1 - |p - DECAY p'|) of repeated ones, where p' is the
        probability one repetition before, without gradient (DITTO, equation 3); and the mean cross-entropy of the
        ordinary tokens alone.
    """
    position = jnp.arange(1, log_probabilities.shape[1] + 1, dtype=jnp.int32)[None, :]
    period, begin = jnp.asarray(batch.period)[:, None], jnp.asarray(batch.begin)[:, None]
    is_repeated = (period > 0) & (position >= begin + period)
    # A repeated passage that begins at token 0 has no probability of that token: its repetitions do not count.
    has_former = is_repeated & (position - period >= 1)
    p = jnp.exp(log_probabilities)
    former = jnp.take_along_axis(p, jnp.maximum(position - 1 - period, 0), axis=1)
    gap = jnp.abs(p - DECAY * jax.lax.stop_gradient(former))
    against = jnp.where(has_former, -jnp.log(jnp.maximum(1.0 - gap, 1e-6)), 0.0)
    ordinary = jnp.where(is_repeated, 0.0, -log_probabilities)
    cross_entropy = jnp.sum(ordinary) / jnp.sum(~is_repeated, dtype=jnp.float32)
    return jnp.mean(ordinary + against), cross_entropy
