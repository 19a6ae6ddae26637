"""Timing of the verification of a tree without the rest of a round.

A compiled loop verifies one tree many times, and each pass depends on the previous one. A call of a single pass would
include the dispatch of all parameters by the host, which takes longer than the pass of a small model.
"""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetWarning
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.round_info import experts_read, mean_distinct_experts
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.timing import TimingCase, decode_once
from moespec_jax.nn.cache import Cache
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

# Rounds before the tree is drafted, and the intended seconds of a loop.
_ROUNDS, _LOOP_SECONDS = 8, 0.2


def decode_and_verify(
    model: Model, prompts: Sequence[Sequence[int]], case: TimingCase, new_tokens: int
) -> dict[str, Any]:
    """Measure as `decode_once`, and also one verification; both new stats are None without a fixed tree.

    Returns:
        Stats of `decode_once`; `verify_s`, seconds of a verification; `verify_experts`, the mean number of experts that
        a layer reads in it.
    """
    stats = decode_once(model, prompts, case, new_tokens)
    if not isinstance(case.spec.tree, TreeConfig):
        return stats | {"verify_s": None, "verify_experts": None}
    return stats | time_verification(model, prompts[: case.batch], case, new_tokens)


def time_verification(
    model: Model, prompts: Sequence[Sequence[int]], case: TimingCase, new_tokens: int
) -> dict[str, Any]:
    """Time a verification of the trees that are drafted for one batch of prompts after some rounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # `decode_once` has shown it
        spec = model.resolve(case.spec)
    method, params, programs = model.speculative(spec, SamplingConfig()), model.speculative_params, model.programs
    limit = [min(len(prompt) + new_tokens, model.config.context_length) for prompt in prompts]
    # So few rounds that no sequence is done before the tree is drafted: a round gains at most the longest path.
    rounds = min(_ROUNDS, max(0, (new_tokens - 2) // method.tree.longest_path))
    state = Run(programs, method, params, Batch([list(p) for p in prompts], limit, (), 0)).state_after(rounds)
    trees = programs.run(draft_only, method, params, state)

    def seconds(passes: int) -> tuple[float, Array]:
        started = time.perf_counter()
        read = jax.block_until_ready(programs.run(verify_many, method, params, state, trees, jnp.int32(passes)))
        return time.perf_counter() - started, read

    seconds(1)  # compiles
    passes = min(64, max(4, round(_LOOP_SECONDS / seconds(2)[0] * 2)))
    spent, read = seconds(passes)
    return {"verify_s": spent / passes, "verify_experts": float(read)}


def draft_only(method: Speculative[Any, Any], params: SpeculativeParams[Any], state: SpeculationState[Any]) -> Tree:
    """Draft trees without returning the state, which would copy the caches."""
    return method.propose(params, state)[0]


def verify_many(
    method: Speculative[Any, Any],
    params: SpeculativeParams[Any],
    state: SpeculationState[Any],
    trees: Tree,
    passes: Int[Array, ""],
) -> Float[Array, ""]:
    """Verify the same trees `passes` times; returns the mean number of distinct experts per layer in the last pass."""

    def verify(_: Array, carry: tuple[Cache, Array, Array]) -> tuple[Cache, Array, Array]:
        cache, tokens, _ = carry
        decoding = dataclasses.replace(state.decoding, cache=cache)
        before = dataclasses.replace(state, decoding=decoding)
        logits, after, info = method.verify(params, before, trees._replace(tokens=tokens))
        # Adds 0, since token ids are not negative; the compiler cannot infer it, so that passes depend on each other.
        tokens = tokens + jnp.minimum(jnp.argmax(logits, axis=-1).astype(jnp.int32), 0)
        read = mean_distinct_experts(experts_read(method.target.config, info, len(tokens)))
        return dataclasses.replace(after, length=cache.length), tokens, read

    start = (state.decoding.cache, trees.tokens, jnp.float32(0.0))
    return jax.lax.fori_loop(0, passes, verify, start)[2]
