"""Training sees what inference will: the unrolled chain against drafting step by step, its scores against brute force,
and gradients that depend neither on recomputation nor on the number of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import head_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import fast_jit
from head_oracle import VOCAB, beside, head_of

from moespec_jax.decoding.eagle3_drafter import extend_cache
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.eagle3 import draft_forward, draft_logits, next_features
from moespec_jax.train.objective import LOSSES, Teacher, unrolled_scores
from moespec_jax.train.unroll import unroll

TOKENS, STEPS = 9, 4
TOLERANCE = 2e-5  # on logits of about 1: sums in another order, four steps deep
variants = pytest.mark.parametrize("variant", ["base", "norm_output", "qk_norm", "two_layers", "biases", "several"])


def case(variant: str, batch: int = 1) -> tuple[Any, ...]:
    config, head, embedding = head_of(variant)
    rng = np.random.default_rng(2)
    aux = jnp.asarray(rng.normal(size=(batch, TOKENS, config.aux_size)), jnp.float32)
    return config, head, embedding, aux, jnp.asarray(rng.integers(0, VOCAB, (batch, TOKENS)), jnp.int32)


def step_logits(variant: str) -> list[np.ndarray]:
    """Every step's logits `[tokens, draft_vocab]` of the unrolled chain."""
    config, head, embedding, aux, tokens = case(variant)
    run = fast_jit(lambda head: unroll(config, head, embedding, aux, tokens, STEPS, lambda _, logits: logits))
    return [np.asarray(one[0]) for one in run(head)]


@pytest.mark.slow_except("norm_output")
@variants
def test_unrolled_chain_equals_drafting(variant: str) -> None:
    """Row t of a batch reads the true prefix up to pair t, then drafts on its own outputs and the same true tokens."""
    config, head, embedding, aux, tokens = case(variant)
    rows = TOKENS - 1

    def chain(head: Any) -> list[jax.Array]:
        cache = empty_cache(config, rows, TOKENS + STEPS, jnp.float32, stacked=False)
        repeated = jnp.repeat(aux[:, :rows], rows, axis=0)
        following, params = jnp.repeat(tokens[:, 1:], rows, axis=0), beside(head, embedding)
        out, cache = extend_cache(config, params, repeated, following, cache)
        # What is behind a row's own prefix must not be seen: make it unlike anything.
        length = jnp.arange(1, rows + 1, dtype=jnp.int32)
        beyond = jnp.arange(cache.slots)[None, None, :, None] >= length[:, None, None, None]
        k, v = (tuple(jnp.where(beyond, 1e4, x) for x in store) for store in (cache.k, cache.v))
        cache = cache.replace(k=k, v=v, length=length)
        out = out[jnp.arange(rows), jnp.arange(rows)][:, None]
        given = [draft_logits(config, head, out)[:, 0]]
        for step in range(1, STEPS):
            at = jnp.minimum(jnp.arange(rows) + 1 + step, TOKENS - 1)
            positions = cache.length[:, None]
            mask, features = causal_mask(positions, cache.slots), next_features(config, head, out)
            out, cache = draft_forward(
                config, head, embedding[tokens[0, at]][:, None], features, positions, mask, cache
            )
            cache = cache.replace(length=cache.length + 1)
            given.append(draft_logits(config, head, out)[:, 0])
        return given

    for step, (ours, expected) in enumerate(zip(step_logits(variant), fast_jit(chain)(head), strict=True)):
        meant = TOKENS - 1 - step
        assert np.asarray(expected).std() > 0.2
        np.testing.assert_allclose(ours[:meant], expected[:meant], atol=TOLERANCE, err_msg=f"step {step}")


@variants
def test_unrolled_chain_equals_the_reference(variant: str) -> None:
    """The same against NumPy, every prefix run from nothing."""
    config, head, embedding, aux, tokens = case(variant)
    true, embedded = oracle.fuse(config, head, np.asarray(aux[0])), np.asarray(embedding)[np.asarray(tokens[0])]
    ours = step_logits(variant)
    for t in range(TOKENS - 1):
        features = true[: t + 1]
        for step in range(min(STEPS, TOKENS - 1 - t)):
            out = oracle.outputs(config, head, features, embedded[1 : t + 2 + step])
            expected = oracle.logits(config, head, out)[-1]
            np.testing.assert_allclose(ours[step][t], expected, atol=TOLERANCE, err_msg=f"step {step}, index {t}")
            features = np.concatenate([features, oracle.handed_on(config, head, out[-1:])])


def test_a_sequence_shorter_than_the_unroll() -> None:
    config, head, embedding, aux, tokens = case("base")
    aux, tokens = aux[:, :2], tokens[:, :2]
    given = fast_jit(lambda head: unroll(config, head, embedding, aux, tokens, STEPS, lambda _, logits: logits))(head)
    assert all(one.shape == (1, 2, config.draft_vocab_size) and np.isfinite(one).all() for one in given)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


REFERENCE_LOSSES = {
    "cross-entropy": lambda p, q: -(p * np.log(q)).sum(-1),
    "kl": lambda p, q: (p * np.log(p / q)).sum(-1),
    "acceptance": lambda p, q: -np.log(np.minimum(p, q).sum(-1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    rng = np.random.default_rng(3)
    target, draft = rng.normal(size=(2, 5, 7, 20)) * 2
    ours = LOSSES[name](jnp.asarray(target, jnp.float32), jnp.asarray(draft, jnp.float32))
    expected = REFERENCE_LOSSES[name](softmax(target), softmax(draft))
    np.testing.assert_allclose(ours, expected, atol=2e-6)  # float32 against float64, on losses of about 3


def teacher_of(head: Any, aux: jax.Array, guesses: list[np.ndarray]) -> tuple[Teacher, jax.Array]:
    """A teacher whose first choice is at every third position what some step of the head guessed, elsewhere often
    outside of the draft vocabulary; and which tokens count."""
    rng, ids = np.random.default_rng(4), np.asarray(head.target_ids)
    whole = rng.normal(size=(len(aux), TOKENS, VOCAB)).astype(np.float32)
    for b in range(len(aux)):
        for p in range(3, TOKENS, 3):
            step = (p + b) % min(len(guesses), 3)
            whole[b, p, ids[guesses[step][b, p - 1 - step].argmax()]] += 9.0
    choice = whole.argmax(-1)
    teacher = Teacher(aux, jnp.asarray(whole[..., ids]), jnp.asarray(choice), jnp.asarray(np.isin(choice, ids)))
    return teacher, jnp.asarray(rng.random((len(aux), TOKENS)) < 0.6)


@pytest.mark.parametrize("name", LOSSES)
def test_scores_equal_brute_force(name: str) -> None:
    """Position by position: a token that does not count is nothing; one that the head cannot say is a miss that bears
    no loss; accuracy is by token of the target's whole vocabulary."""
    batch = 3
    config, head, embedding, aux, tokens = case("base", batch)
    run = fast_jit(lambda head: unroll(config, head, embedding, aux, tokens, STEPS, lambda _, logits: logits))
    logits = [np.asarray(one) for one in run(head)]
    teacher, counts = teacher_of(head, aux, logits)
    scores = fast_jit(
        lambda head: unrolled_scores(config, head, embedding, teacher, tokens, counts, STEPS, LOSSES[name], True)
    )(head)
    ids, unreachable = np.asarray(head.target_ids), 0
    for step in range(STEPS):
        loss, hits, positions = 0.0, 0, 0
        for b in range(batch):
            for t in range(TOKENS - 1 - step):
                p = t + 1 + step  # the target's last token before the one to be predicted
                if not counts[b, p]:
                    continue
                positions += 1
                if int(teacher.choice[b, p]) not in ids:
                    unreachable += 1
                    continue
                of_target, of_draft = (np.asarray(x, np.float64) for x in (teacher.logits[b, p], logits[step][b, t]))
                loss += REFERENCE_LOSSES[name](softmax(of_target), softmax(of_draft))
                hits += ids[of_draft.argmax()] == int(teacher.choice[b, p])
        assert (float(scores[step].hits), float(scores[step].positions)) == (hits, positions)
        np.testing.assert_allclose(scores[step].loss, loss, rtol=1e-5)  # a float32 sum of some ten losses
    assert unreachable > 5 and sum(float(score.hits) for score in scores) > 3


@pytest.mark.slow
def test_gradients_do_not_depend_on_recomputation() -> None:
    config, head, embedding, aux, tokens = case("norm_output", 2)
    teacher, counts = teacher_of(head, aux, [np.zeros((2, TOKENS, 1))])

    def loss(head: Any, recompute: bool) -> jax.Array:
        whole = head.replace(target_ids=ids)
        few = (embedding, teacher, tokens, counts, 2, LOSSES["cross-entropy"], recompute)
        return sum(score.loss for score in unrolled_scores(config, whole, *few)) / tokens.size

    ids, head = head.target_ids, head.replace(target_ids=None)
    kept, again = (fast_jit(jax.grad(lambda h, r=r: loss(h, r)))(head) for r in (False, True))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        assert np.abs(one).max() > 1e-5
        np.testing.assert_allclose(one, other, atol=1e-6)  # the same sums, fused otherwise; gradients up to about 1


@pytest.mark.slow
def test_four_devices_take_the_same_step_as_one() -> None:
    """A step of plain descent at rate 1, so that what moves is the gradient itself; in a process with four devices."""
    flags = ["force_host_platform_device_count=4", "backend_optimization_level=0", "llvm_disable_expensive_passes=true"]
    environment = os.environ | {"XLA_FLAGS": " ".join(f"--xla_{flag}" for flag in flags), "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).parent / "four_devices.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["largest"] > 1e-3
    assert found["difference"] <= 1e-6  # sums over rows in another order, gradients of about 0.1
    assert found["metrics"] <= 1e-5 and found["held_out"] == 0.0
