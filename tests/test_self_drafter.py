"""A target that drafts itself: its trees against passes over each path, and the text of plain decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tree_oracle
from driver import fast_jit
from speculation import GREEDY, Decoding, FastPrograms, decode
from test_speculate import PROMPTS, every_family, pair, plain_tokens

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.drafter import Drafter, SpeculativeParams
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.self_drafter import SelfDrafter
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.nn.attention import causal_mask
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import forward, unembed
from moespec_jax.runtime.run import Batch, Run

CHAIN, TREE, WHOLE = TreeConfig(2, 1, 4), TreeConfig(2, 3, 7), TreeConfig(1, 3, 13)


def drafting_itself(
    family: str, experts: int, tree: TreeConfig, sampling: SamplingConfig = GREEDY, backend: str = "switch"
) -> Decoding:
    config, params, form, *_ = pair(family, backend)
    accept = accept_rule(sampling, tree.longest_path)
    method = Speculative(Autoregressive(config, sampling, form), SelfDrafter(config, form, experts), tree, accept)
    return Decoding(method, SpeculativeParams(params, ()))


def path_log_probabilities(family: str, backend: str, experts: int, text: list[int], paths: np.ndarray) -> np.ndarray:
    """Log-probabilities after the root and after each token of every path: one pass for the text before the root, with
    all experts, and one for the root and a path with few."""
    config, params, form, *_ = pair(family, backend)
    few = dataclasses.replace(config, num_experts_per_tok=experts)
    known, rest = len(text) - 1, np.concatenate([np.full((len(paths), 1), text[-1]), paths], axis=1)

    def run(params: Any, known_ids: jax.Array, rest: jax.Array) -> jax.Array:
        def read(config: Any, ids: jax.Array, start: int, cache: Any) -> tuple[jax.Array, Any]:
            positions = start + jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
            cache = dataclasses.replace(cache, length=jnp.full((len(ids),), start, jnp.int32))
            mask = causal_mask(positions, cache.slots)
            hidden, cache, _ = forward(config, params, ids, positions, mask, cache, form)
            return unembed(params, hidden), cache

        cache = empty_cache(config, len(rest), known + rest.shape[1], jnp.float32, stacked=form.stacked)
        _, cache = read(config, known_ids, 0, cache)
        return jax.nn.log_softmax(read(few, rest, known, cache)[0], axis=-1)

    known_ids = np.tile(np.array(text[:-1], np.int32), (len(paths), 1))
    return np.asarray(fast_jit(run)(params, jnp.asarray(known_ids), jnp.asarray(rest, jnp.int32)))


@pytest.mark.slow_except("slots-1-mixtral")
@every_family
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("backend", ["switch", "slots"])
def test_trees_are_those_of_passes_with_fewer_experts(family: str, experts: int, backend: str) -> None:
    """Every child of the root and of its children, with its score."""
    decoding = drafting_itself(family, experts, WHOLE, backend=backend)
    assert isinstance(decoding.method.drafter, Drafter)
    run = Run(FastPrograms(), *decoding, Batch(PROMPTS[:1], [40], (), 0))
    state = run.state_after(3)
    trees, _ = fast_jit(decoding.method.propose)(decoding.params, state)
    tokens, parents, scores = (part[0].tolist() for part in trees)
    text = np.asarray(state.decoding.tokens)[0, : int(state.decoding.length[0])].tolist()
    first = [i for i in range(13) if parents[i] == 0]
    logs = path_log_probabilities(family, backend, experts, text, np.array([[tokens[i]] for i in first]))
    assert sorted(tokens[i] for i in first) == sorted(tree_oracle.best(logs[0, 0].tolist(), 3))
    for row, node in zip(logs, first, strict=True):
        children = [i for i in range(13) if parents[i] == node]
        assert sorted(tokens[i] for i in children) == sorted(tree_oracle.best(row[1].tolist(), 3))
        # Sums in another order.
        np.testing.assert_allclose(scores[node], row[0, tokens[node]], atol=1e-4)
        np.testing.assert_allclose(
            [scores[i] - scores[node] for i in children], row[1, [tokens[i] for i in children]], atol=1e-4
        )


@pytest.mark.slow_except("1.0-4/2/1-olmoe")
@every_family
@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=lambda tree: tree.name)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_plain_decoding_s(family: str, tree: TreeConfig, temperature: float) -> None:
    """In a batch, in one call and in many: drafted rows leave no trace in the cache."""
    new, sampling, programs = 60, SamplingConfig(temperature), FastPrograms()
    plain = plain_tokens(family, "switch", new, sampling)
    decoding = drafting_itself(family, 1, tree, sampling)
    run = decode(decoding, programs, PROMPTS, new)
    assert run.sequences == plain and run.accepted.sum() > 5
    pieces = Run(programs, *decoding, Batch(PROMPTS, [len(p) + new for p in PROMPTS], (), 0))
    pieces.execute(on_round=lambda number, info: None)
    assert pieces.sequences == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_all_of_its_experts_every_draft_is_accepted(temperature: float) -> None:
    """Greedy, and where tokens are sampled, too: drafts share the noise of the draws."""
    sampling = SamplingConfig(temperature)
    run = decode(drafting_itself("qwen3_moe", 2, CHAIN, sampling), FastPrograms(), PROMPTS, 40)
    assert run.sequences == [
        s[: len(p) + 40] for s, p in zip(plain_tokens("qwen3_moe", "switch", 60, sampling), PROMPTS, strict=True)
    ]
    assert run.accepted.sum() == run.active.sum() * (CHAIN.longest_path - 1)
