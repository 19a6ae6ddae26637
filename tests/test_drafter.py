"""Laws of drafters: whatever one drafts, output is plain decoding's; a perfect one is accepted whole."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array
from speculation import Decoding, FastPrograms, decode, plainly
from test_speculate import PROMPTS, pair, plain_tokens

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import Accepted, accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.drafter import Drafter, SpeculationState, SpeculativeParams, StatelessDrafter
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.tree import Tree

CHAIN, TREE = TreeConfig(depth=3, top_k=1, size=5), TreeConfig(depth=2, top_k=2, size=7)
NEW = 60


def drafting(drafter: Any, tree: TreeConfig, sampling: SamplingConfig | None = None, draft: Any = ()) -> Decoding:
    """Speculative decoding of the tiny pair's target with another drafter."""
    config, params, backend, _, _ = pair()
    sampling = sampling or SamplingConfig()
    method = Speculative(
        Autoregressive(config, sampling, backend), drafter, tree, accept_rule(sampling, tree.longest_path)
    )
    return Decoding(method, SpeculativeParams(params, draft))


def chain_of(tokens: Array) -> Tree:
    """Chains from tokens `[batch, nodes]`, the root first."""
    depth = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    return Tree(tokens, depth - 1, depth.astype(jnp.float32) * jnp.log(jnp.float32(0.5)))


@dataclasses.dataclass(frozen=True)
class Repeat(StatelessDrafter):
    """Draft the text from `back` tokens before its end."""

    back: int = 3

    def propose(
        self, tree: TreeConfig, params: SpeculativeParams[Any], state: SpeculationState[Any]
    ) -> tuple[Tree, SpeculationState[Any]]:
        at = state.decoding.length[:, None] - 1 - self.back + jnp.arange(tree.size, dtype=jnp.int32)[None, :]
        tokens = jnp.take_along_axis(state.decoding.tokens, jnp.clip(at, 0), axis=1)
        root = jnp.take_along_axis(state.decoding.tokens, state.decoding.length[:, None] - 1, axis=1)
        return chain_of(tokens.at[:, :1].set(root)), state


@dataclasses.dataclass(frozen=True)
class Fixed(StatelessDrafter):
    """Draft the same two-level tree everywhere: children 1 and 2, each with children 3 and 4."""

    def propose(
        self, tree: TreeConfig, params: SpeculativeParams[Any], state: SpeculationState[Any]
    ) -> tuple[Tree, SpeculationState[Any]]:
        root = jnp.take_along_axis(state.decoding.tokens, state.decoding.length[:, None] - 1, axis=1)
        rest = jnp.broadcast_to(jnp.asarray([[1, 2, 3, 4, 3, 4]], jnp.int32), (len(root), 6))
        parents = jnp.broadcast_to(jnp.asarray([[-1, 0, 0, 1, 1, 2, 2]], jnp.int32), (len(root), 7))
        return Tree(jnp.concatenate([root, rest], axis=1), parents, jnp.zeros(parents.shape, jnp.float32)), state


@dataclasses.dataclass(frozen=True)
class Prophet:
    """Draft the text that is given as parameters `[batch, slots]`; its state counts what `commit` reports accepted."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        return (0, 2)

    def init(self, params: SpeculativeParams[Array], batch: int, slots: int) -> Array:
        return jnp.zeros((batch, 2), jnp.int32)

    def read(
        self, params: SpeculativeParams[Array], state: Array, next_tokens: Array, aux_hidden_states: Array | None,
        start: Array, prompt_lengths: Array,
    ) -> Array:  # fmt: skip
        assert aux_hidden_states is not None and aux_hidden_states.shape[:2] == next_tokens.shape
        return state.at[:, 1].add(next_tokens.shape[1])

    def begin(self, tree: TreeConfig, state: Array, prompt_lengths: Array) -> Array:
        return state

    def propose(
        self, tree: TreeConfig, params: SpeculativeParams[Array], state: SpeculationState[Array]
    ) -> tuple[Tree, SpeculationState[Array]]:
        at = state.decoding.length[:, None] - 1 + jnp.arange(tree.size, dtype=jnp.int32)[None, :]
        return chain_of(jnp.take_along_axis(params.draft, jnp.minimum(at, params.draft.shape[1] - 1), axis=1)), state

    def commit(self, state: Array, accepted: Accepted, aux_hidden_states: Array | None) -> Array:
        assert aux_hidden_states is not None and aux_hidden_states.shape[1] == CHAIN.size
        return state.at[:, 0].add(accepted.count)

    def skip(self, state: Array, position: Array, aux_hidden_states: Array | None) -> Array:
        raise NotImplementedError

    def specs(self, params: SpeculativeParams[Array]) -> Array:
        raise NotImplementedError


WARM = SamplingConfig(0.8, 12, 0.95)
greedy_and_sampled = pytest.mark.parametrize("sampling", [SamplingConfig(), WARM], ids=["greedy", "sampled"])


@greedy_and_sampled
@pytest.mark.parametrize("drafter, tree", [(Repeat(), CHAIN), (Fixed(), TREE)], ids=["chain", "tree"])
def test_output_is_plain_decoding_s(drafter: Any, tree: TreeConfig, sampling: SamplingConfig) -> None:
    run = decode(drafting(drafter, tree, sampling), FastPrograms(), PROMPTS, NEW)
    assert run.sequences == [
        s[: len(p) + NEW] for s, p in zip(plain_tokens("qwen3_moe", "switch", 340, sampling), PROMPTS, strict=True)
    ]
    assert 0 < run.accepted.sum() < run.active.sum() * (tree.longest_path - 1)


@greedy_and_sampled
def test_a_perfect_drafter_is_accepted_whole_and_keeps_its_state(sampling: SamplingConfig) -> None:
    whole = plain_tokens("qwen3_moe", "switch", 340, sampling)
    text = jnp.asarray([s[: len(p) + NEW + 8] + [0] * (40 - len(p)) for s, p in zip(whole, PROMPTS, strict=True)])
    decoding, programs = drafting(Prophet(), CHAIN, sampling, text.astype(jnp.int32)), FastPrograms()
    assert isinstance(decoding.method.drafter, Drafter)
    run = decode(decoding, programs, PROMPTS, NEW)
    assert run.sequences == [s[: len(p) + NEW] for s, p in zip(whole, PROMPTS, strict=True)]
    assert run.accepted.sum() == run.active.sum() * (CHAIN.longest_path - 1)
    assert run.rounds == -(-(NEW - 1) // CHAIN.longest_path)
    assert programs.traces == {"DraftedPrefill.read": 1, "Speculative.begin": 1, "Speculative.step": 1}


@pytest.mark.slow
def test_sampled_output_has_the_targets_distribution() -> None:
    """Of 4096 sequences the second token's frequencies under a bad drafter and under plain decoding differ by no more
    than two plain runs do."""
    sampling, prompts = SamplingConfig(1.0), [[1, 2, 3]] * 2048
    programs = FastPrograms()

    def counts(decoding: Decoding, seed: int) -> Array:
        run = decode(decoding, programs, prompts, 3, seed=seed)
        pairs = jnp.asarray([s[4] * 16 + s[5] for s in run.sequences])
        return jnp.bincount(pairs, length=256).astype(jnp.float32) / len(prompts)

    plain = plainly(*pair()[:3], sampling)
    first, second = counts(plain, 1), counts(plain, 2)
    drafted = counts(drafting(Fixed(), TREE, sampling), 3)
    floor = float(jnp.sum(jnp.abs(first - second)))
    assert float(jnp.sum(jnp.abs(drafted - first))) < 1.3 * floor  # total variation of two samples, with its spread


@pytest.mark.slow
def test_generate_takes_a_drafter_in_place_of_a_head() -> None:
    """Through the public call: exact, named in the result, and refused nothing for lack of a head."""
    from moespec_jax import load

    model = dataclasses.replace(load(), draft=None)
    plain = model.generate("import os\n", tree=None, max_new_tokens=12)
    drafted = model.generate("import os\n", tree=CHAIN, drafter=Repeat(), max_new_tokens=12)
    assert drafted.prompts[0].token_ids == plain.prompts[0].token_ids
    assert drafted.exact and drafted.draft_model == "Repeat" and drafted.prompts[0].rounds <= 11
    assert jax.tree.leaves(model.speculative_params.draft) == []
