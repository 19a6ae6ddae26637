"""How long the target's pass over a tree takes by itself, as one of many in a compiled loop.

A pass that is called alone costs the host as much as passing all parameters takes, which on small models is more than
the pass: so a loop makes many passes of one tree, and each needs the one before.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moespec_jax.decoding.budget_config import resolve
from moespec_jax.decoding.round_info import experts_read, mean_distinct_experts
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import (
    SpeculationSettings,
    SpeculationState,
    Speculator,
    draft_trees,
    verify_trees,
)
from moespec_jax.decoding.tree import Tree
from moespec_jax.measure.timing import Setting, decode_once
from moespec_jax.nn.cache import Cache
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

# Rounds after which the tree is taken, and seconds that a loop is made to last.
_ROUNDS, _LASTING = 8, 0.2


def decode_and_verify(
    model: Model, prompts: Sequence[Sequence[int]], setting: Setting, new_tokens: int
) -> dict[str, Any]:
    """As `decode_once`, with `verify_s` of one verification, and `verify_experts` that each of its layers read; both
    None in plain decoding."""
    told = decode_once(model, prompts, setting, new_tokens)
    if setting.tree is None:
        return told | {"verify_s": None, "verify_experts": None}
    return told | time_verification(model, prompts[: setting.batch], setting, new_tokens)


def time_verification(
    model: Model, prompts: Sequence[Sequence[int]], setting: Setting, new_tokens: int
) -> dict[str, Any]:
    """Seconds of one verification of the tree that one batch of prompts has after some rounds."""
    assert setting.tree is not None
    budget = None if setting.budget is None else resolve(setting.budget, model.config)
    method = model.method(SamplingConfig(), setting.tree, budget, setting.simulate)
    settings, pair, programs = method.settings, method.params, model.programs
    assert isinstance(settings, SpeculationSettings)
    limit = [min(len(prompt) + new_tokens, model.config.context_length) for prompt in prompts]
    # All rounds gain a path at most: nobody is done before the tree is taken.
    rounds = min(_ROUNDS, max(0, (new_tokens - 2) // setting.tree.longest_path))
    state = Run(programs, method, Batch([list(p) for p in prompts], limit, (), 0)).state_after(rounds)
    trees, _ = programs.run(draft_trees, settings, pair, state)

    def seconds(passes: int) -> tuple[float, Array]:
        started = time.perf_counter()
        read = jax.block_until_ready(programs.run(verify_many, settings, pair, state, trees, jnp.int32(passes)))
        return time.perf_counter() - started, read

    seconds(1)  # compiles
    passes = min(64, max(4, round(_LASTING / seconds(2)[0] * 2)))
    spent, read = seconds(passes)
    return {"verify_s": spent / passes, "verify_experts": float(read)}


def verify_many(
    settings: SpeculationSettings, pair: Speculator, state: SpeculationState, trees: Tree, passes: Int[Array, ""]
) -> Float[Array, ""]:
    """Verify the same trees `passes` times; the distinct experts that a layer reads in one."""

    def verify(_: Array, carry: tuple[Cache, Array, Array]) -> tuple[Cache, Array, Array]:
        cache, tokens, _ = carry
        decoding = dataclasses.replace(state.decoding, cache=cache)
        before = dataclasses.replace(state, decoding=decoding)
        logits, after, info = verify_trees(settings, pair.target, before, trees._replace(tokens=tokens))
        # No choice is below 0, which the compiler does not know.
        tokens = tokens + jnp.minimum(jnp.argmax(logits, axis=-1).astype(jnp.int32), 0)
        read = mean_distinct_experts(experts_read(settings.target.config, info, len(tokens)))
        return dataclasses.replace(after, length=cache.length), tokens, read

    start = (state.decoding.cache, trees.tokens, jnp.float32(0.0))
    return jax.lax.fori_loop(0, passes, verify, start)[2]
