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
import numpy as np
from jaxtyping import Array, Float, Int

from moespec_jax.bench.exchange import exchanged_bytes
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetWarning
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.round_info import experts_read, mean_distinct_experts
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.state_specs import BY_SEQUENCE, REPLICATED
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.timing import TimingCase, decode_once
from moespec_jax.nn.best_tokens import best_of
from moespec_jax.nn.cache import Cache
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

# Rounds before the tree is drafted, and the intended seconds of a loop.
_ROUNDS, _LOOP_SECONDS = 8, 0.2


def decode_and_verify(
    model: Model, prompts: Sequence[Sequence[int]], case: TimingCase, new_tokens: int
) -> dict[str, Any]:
    """Measure as `decode_once`, and also one verification; its stats are None without a fixed tree.

    Returns:
        Stats of `decode_once`; `verify_s`, seconds of a verification; `verify_experts`, the mean number of experts that
        a layer reads in it; `exchanged_bytes` of a round, None without a mesh and where every round chooses its shape.
    """
    stats, first = decode_once(model, prompts, case, new_tokens), prompts[: case.batch]
    if isinstance(case.spec.tree, TreeConfig):
        return stats | time_verification(model, first, case, new_tokens)
    exchanged = None
    if case.spec.tree is None and model.programs.mesh is not None:
        method = model.autoregressive(SamplingConfig())
        state = Run(model.programs, method, model.params, _batch(model, first, new_tokens)).state_after(0)
        exchanged = exchanged_bytes(model.programs, method, model.params, state)
    return stats | {"verify_s": None, "verify_experts": None, "exchanged_bytes": exchanged}


def _batch(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> Batch:
    limit = [min(len(prompt) + new_tokens, model.config.context_length) for prompt in prompts]
    return Batch([list(prompt) for prompt in prompts], limit, (), 0)


def time_verification(
    model: Model, prompts: Sequence[Sequence[int]], case: TimingCase, new_tokens: int
) -> dict[str, Any]:
    """Time a verification of the trees that are drafted for one batch of prompts after some rounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # `decode_once` has shown it
        spec = model.resolve(case.spec)
    method, params, programs = model.speculative(spec, SamplingConfig()), model.speculative_params, model.programs
    # So few rounds that no sequence is done before the tree is drafted: a round gains at most the longest path.
    rounds = min(_ROUNDS, max(0, (new_tokens - 2) // method.tree.longest_path))
    state = Run(programs, method, params, _batch(model, prompts, new_tokens)).state_after(rounds)
    by_sequence: Any = BY_SEQUENCE
    trees = programs.run(draft_only, method, params, state, specs=by_sequence)

    same: Any = REPLICATED

    def seconds(passes: int) -> tuple[float, Array]:
        started = time.perf_counter()
        count = programs.put(np.array(passes, np.int32))
        read = jax.block_until_ready(programs.run(verify_many, method, params, state, trees, count, specs=same))
        return time.perf_counter() - started, read

    seconds(1)  # compiles
    passes = min(64, max(4, round(_LOOP_SECONDS / seconds(2)[0] * 2)))
    spent, read = seconds(passes)
    exchanged = exchanged_bytes(programs, method, params, state)
    return {"verify_s": spent / passes, "verify_experts": float(read), "exchanged_bytes": exchanged}


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
        outputs, after, info = method.verify_to_accept(params, before, trees._replace(tokens=tokens))
        # Adds 0, since token ids are not negative; the compiler cannot infer it, so that passes depend on each other.
        tokens = tokens + jnp.minimum(best_of(outputs).ids, 0)
        read = mean_distinct_experts(experts_read(method.target.config, info, len(tokens)))
        return dataclasses.replace(after, length=cache.length), tokens, read

    start = (state.decoding.cache, trees.tokens, jnp.float32(0.0))
    return jax.lax.fori_loop(0, passes, verify, start)[2]
