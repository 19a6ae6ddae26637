"""Training against repetition loops: greedy text of a small model ends in loops, since each repetition of a passage
makes the next one more probable.

In some rows of a batch a passage is repeated some times before the text goes on. What goes on is learned, and so are
the tokens within repetitions; but the token with which one more repetition begins is not, and from the second one on it
becomes less probable (unlikelihood: Welleck et al., arXiv:1908.04319). So the model learns to leave a repetition, and
for which text. Lowering the probabilities of repetitions alone (DITTO, arXiv:2206.02369) moved theirs to one token,
which then filled texts.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Longest passage that is repeated, and most repetitions.
LONGEST, MOST = 64, 16


class Batch(NamedTuple):
    """Rows of one step. Flags belong to targets, `tokens[:, 1:]`.

    Fields:
        tokens: ids, `[rows, length + 1]`.
        likely: targets that become more probable.
        unlikely: targets that become less probable.
    """

    tokens: Int[np.ndarray, "rows width"] | Int[Array, "rows width"]
    likely: Bool[np.ndarray, "rows targets"] | Bool[Array, "rows targets"]
    unlikely: Bool[np.ndarray, "rows targets"] | Bool[Array, "rows targets"]


def repeated(tokens: np.ndarray, count: int, random: np.random.Generator) -> Batch:
    """Make a batch of rows of text, in the first `count` of which a passage is repeated, over up to a third of the
    row. Lengths of passages are distributed uniformly in their logarithm."""
    rows, width = tokens.shape
    tokens, likely = tokens.copy(), np.ones((rows, width - 1), bool)
    unlikely = ~likely
    for row in range(count):
        period = round(np.exp(random.uniform(0, np.log(min(LONGEST, width // 4)))))
        copies = int(random.integers(1, min(MOST, width // 3 // period) + 1))
        begin = int(random.integers(1, width // 4))
        end = begin + period
        text = tokens[row].copy()
        tokens[row] = np.concatenate([text[:end], np.tile(text[begin:end], copies), text[end:]])[:width]
        # Targets that are the first token of a repetition.
        first = end - 1 + period * np.arange(copies)
        likely[row, first], unlikely[row, first[1:]] = False, True
    return Batch(tokens, likely, unlikely)


def loss_with_repetition(
    log_probabilities: Float[Array, "rows length"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the loss from the log-probabilities of the tokens `batch.tokens[:, 1:]`.

    Returns:
        The mean over all tokens of -log p of likely ones and -log(1 - p) of unlikely ones; and the mean cross-entropy
        of the likely ones alone.
    """
    likely, unlikely = jnp.asarray(batch.likely), jnp.asarray(batch.unlikely)
    ordinary = jnp.where(likely, -log_probabilities, 0.0)
    against = jnp.where(unlikely, -jnp.log(jnp.maximum(1.0 - jnp.exp(log_probabilities), 1e-6)), 0.0)
    return jnp.mean(ordinary + against), jnp.sum(ordinary) / jnp.sum(likely, dtype=jnp.float32)
