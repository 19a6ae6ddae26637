"""The choice of a round's shape: what it may lose against plain decoding, and what it finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moespec_jax.decoding.choice import FIRST_CREDIT, MOST_LOSS, Choice, after_round, first_choice

STEP = jax.jit(after_round, static_argnums=1)


def run(costs: list[float], gains: list[list[float]], rounds: int, seed: int = 0) -> tuple[list[int], list[float]]:
    """Shapes of the rounds, and tokens that they gained: whole numbers around the mean gain of the shape in this part
    of the text."""
    random, shapes, tokens = np.random.default_rng(seed), [], []
    choice = first_choice(jnp.asarray(costs, jnp.float32), jnp.asarray([1.0, *[2.0] * (len(costs) - 1)], jnp.float32))
    for number in range(rounds):
        shape = int(choice.current)
        mean = gains[number * len(gains) // rounds][shape]
        count = 1.0 if shape == 0 else float(int(mean) + (random.random() < mean % 1))
        shapes.append(shape)
        tokens.append(count)
        choice = STEP(choice, shape, jnp.float32(count))
    return shapes, tokens


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1.05, 12.0), min_size=2, max_size=4),
    st.lists(st.floats(1.0, 4.0), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_rounds_never_cost_more_than_plain_decoding_and_the_allowed_loss(
    trees: list[float], phases: list[float], seed: int
) -> None:
    """At every round, for any gains: beyond the first credit, the time of all rounds is within the allowed loss of
    plain decoding's for the same tokens."""
    costs = [1.0, *trees]
    gains = [[1.0, *[max(1.0, phase)] * len(trees)] for phase in phases]
    shapes, tokens = run(costs, gains, 60, seed)
    spent, plain = np.cumsum([costs[shape] for shape in shapes]), np.cumsum(tokens)
    assert np.all(spent <= (1 + MOST_LOSS) * plain + max(min(trees) - 1.0, FIRST_CREDIT) + 1e-3)


@pytest.mark.parametrize(
    ("costs", "gains"),
    [
        ([1.0, 1.5, 2.5], [1.0, 2.5, 3.0]),  # the short one pays most
        ([1.0, 1.5, 2.5], [1.0, 1.8, 4.0]),  # the long one
        ([1.0, 1.5, 2.5], [1.0, 1.1, 1.2]),  # neither
    ],
)
def test_the_best_shape_of_a_steady_text_is_found(costs: list[float], gains: list[float]) -> None:
    shapes, tokens = run(costs, [gains], 1500)
    speed = sum(tokens) / sum(costs[shape] for shape in shapes)
    best = max(gain / cost for gain, cost in zip(gains, costs, strict=True))
    assert speed >= 0.95 * best


def test_a_change_of_the_text_is_noticed_in_both_directions() -> None:
    """Text that is easy to draft, then hard, then easy: in the middle of each part, most rounds have its shape."""
    costs, easy, hard = [1.0, 2.0], [1.0, 3.5], [1.0, 1.05]
    shapes, _ = run(costs, [easy, hard, easy], 1500)
    middles = [np.mean(shapes[start + 100 : start + 400]) for start in (0, 500, 1000)]
    assert middles[0] > 0.9 and middles[1] < 0.15 and middles[2] > 0.9


def test_a_run_is_repeated_by_its_counts() -> None:
    costs, gains = [1.0, 1.7, 3.0], [[1.0, 2.0, 3.1], [1.0, 1.2, 1.2]]
    assert run(costs, gains, 120, seed=5) == run(costs, gains, 120, seed=5)


def test_of_finite_and_infinite_costs_the_finite_one_is_chosen() -> None:
    """A measurement relies on it, to run one shape at a time."""
    for shape in range(3):
        costs = jnp.asarray(np.where(np.arange(3) == shape, 1.0, np.inf), jnp.float32)
        choice: Choice = first_choice(costs, jnp.ones(3, jnp.float32))
        for _ in range(4):
            assert int(choice.current) == shape
            choice = STEP(choice, shape, jnp.float32(1.0))
