"""Choice of the next round's shape: plain decoding, or a draft tree of a menu.

A drafted round of cost c that gains g tokens on average is worth its cost where g / c exceeds the one token of a plain
round over its cost. Costs are given. Gains are estimated from the rounds of this run: sums of tokens and of rounds that
decay, so that an estimate follows the text, and returns to its prior where a shape was not tried for long. Besides, a
share `TRIALS` of the time goes to the shape that was not tried for longest. Decisions are a function of costs and
counts alone, never of a clock: a run's rounds can be repeated.

The time of a run, by the costs, stays within `MOST_LOSS` of plain decoding's: `credit` is what plain decoding would
have taken for the tokens, `MOST_LOSS` more, minus what the rounds took. A drafted round is chosen only where the credit
covers the most that it can lose: it gains one token at least.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moespec_jax.nn.summary import summary

MOST_LOSS, TRIALS = 0.02, 0.02
# The credit of the beginning, in plain rounds: with little, a few unlucky rounds end drafting for long.
FIRST_CREDIT = 2.5
# Weight of a prior, in rounds; and what a shape's estimate is raised by where it was never tried, in tokens.
PRIOR_ROUNDS, OPTIMISM = 2.0, 0.4
# Of the sums, in a round of the shape and in a round of another one.
DECAY, DECAY_UNTRIED = 0.9, 0.98


@struct.dataclass
class Choice:
    """State of the choice in a run; shape 0 is plain decoding.

    Fields:
        costs: seconds of a round.
        priors: tokens that a round is expected to gain before any was run.
        gained: decayed sum of the tokens that a sequence gained in a round.
        tried: decayed number of rounds.
        credit: seconds, see above.
        trials: seconds that trials may take.
        current: shape of the next round.
    """

    costs: Float[Array, " shapes"]
    priors: Float[Array, " shapes"]
    gained: Float[Array, " shapes"]
    tried: Float[Array, " shapes"]
    credit: Float[Array, ""]
    trials: Float[Array, ""]
    current: Int[Array, ""]

    __repr__ = summary


def first_choice(costs: Float[Array, " shapes"], priors: Float[Array, " shapes"]) -> Choice:
    """Choose the first shape. The credit is `FIRST_CREDIT`, and covers one round of the cheapest tree at least."""
    credit = jnp.maximum(jnp.min(costs[1:]) - costs[0], FIRST_CREDIT * costs[0])
    # Zeros apart: a state is donated, and no array may be in it twice.
    tried, gained = jnp.zeros_like(costs), jnp.zeros_like(costs)
    return chosen(Choice(costs, priors, gained, tried, credit, jnp.float32(0.0), jnp.int32(0)))


def after_round(choice: Choice, shape: int, tokens: Float[Array, ""]) -> Choice:
    """Count a round of `shape` that gained `tokens` a sequence, and choose the next one's shape."""
    is_shape = jnp.arange(choice.costs.shape[0], dtype=jnp.int32) == shape
    decay = jnp.where(is_shape, DECAY, DECAY_UNTRIED)
    cost = choice.costs[shape]
    return chosen(
        dataclasses.replace(
            choice,
            gained=choice.gained * decay + jnp.where(is_shape, tokens, 0.0),
            tried=choice.tried * decay + jnp.where(is_shape, 1.0, 0.0),
            credit=choice.credit + (1.0 + MOST_LOSS) * tokens * choice.costs[0] - cost,
            trials=choice.trials + TRIALS * cost,
        )
    )


def expected_gains(choice: Choice) -> Float[Array, " shapes"]:
    """Estimate the tokens that a round of each shape gains."""
    return (choice.gained + PRIOR_ROUNDS * choice.priors) / (choice.tried + PRIOR_ROUNDS)


def chosen(choice: Choice) -> Choice:
    """Choose the shape of the most tokens a second, or a trial of another one, among those that the credit covers.

    Estimates of a few rounds are raised, so that shapes that may pay are tried first. A plain round gains one token for
    certain.
    """
    shapes = jnp.arange(choice.costs.shape[0], dtype=jnp.int32)
    covered = (shapes == 0) | (choice.credit >= choice.costs - choice.costs[0])
    optimism = OPTIMISM * (PRIOR_ROUNDS / (choice.tried + PRIOR_ROUNDS)) ** 0.5
    gains = jnp.where(shapes == 0, 1.0, expected_gains(choice) + optimism)
    best = jnp.argmax(jnp.where(covered, gains / choice.costs, 0.0)).astype(jnp.int32)
    may_be_tried = covered & (shapes > 0) & (shapes != best) & (choice.trials >= choice.costs)
    trial = jnp.argmin(jnp.where(may_be_tried, choice.tried, jnp.inf)).astype(jnp.int32)
    tries = jnp.any(may_be_tried)
    spent = jnp.where(tries, choice.costs[trial], 0.0)
    return dataclasses.replace(choice, trials=choice.trials - spent, current=jnp.where(tries, trial, best))
