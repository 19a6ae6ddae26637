"""Other functions in place of a round's own: they are what decodes, and nothing is claimed of what comes out."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from driver import fast_jit
from tiny_pair import write_pair

from moespec_jax import Model, RequestError, TreeConfig, load
from moespec_jax.decoding.accept import Accepted, accept_rule
from moespec_jax.decoding.history import History
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.decoding.tree import Tree
from moespec_jax.nn.decoder import Decoder, forward, unembed

pytestmark = pytest.mark.usefixtures("fast_compile")

PROMPT, TREE, NEW = [[5, 17, 9, 200]], TreeConfig(depth=1, top_k=2, size=5), 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory: Path = tmp_path_factory.mktemp("pair")
    write_pair(directory, NEW)
    return load(str(directory / "target"), str(directory / "head"))


def tokens(model: Model, **asked: Any) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=NEW, ignore_eos=True, **asked).prompts[0].token_ids


def runner_up(tree: Tree, logits: jax.Array, key: jax.Array, history: History) -> Accepted:
    """The root alone, then the target's second choice."""
    second = jax.lax.top_k(logits[0], 2)[1][1].astype(jnp.int32)
    return Accepted(jnp.zeros((TREE.longest_path,), jnp.int32), jnp.int32(1), second)


def test_an_acceptance_rule_decides_what_is_emitted(model: Model) -> None:
    """Second choices, one a round, as one-token passes over what was emitted so far give them."""
    got = tokens(model, tree=TREE, adapt=lambda method: dataclasses.replace(method, accept=runner_up))
    sequence = list(PROMPT[0]) + tokens(model, tree=None)[:1]  # the first token is drawn before any round
    whole = len(PROMPT[0]) + 4
    mask = jnp.tril(jnp.ones((1, whole, whole), bool))

    @fast_jit
    def logits(params: Decoder, ids: jax.Array) -> jax.Array:
        positions = jnp.arange(whole, dtype=jnp.int32)[None, :]
        return unembed(params, forward(model.config, params, ids, positions, mask, None, model.backend)[0])[0]

    while len(sequence) < whole:
        ids = jnp.asarray([sequence + [0] * (whole - len(sequence))], jnp.int32)  # no token sees what comes after it
        sequence.append(int(jnp.argsort(logits(model.params, ids)[len(sequence) - 1])[-2]))
    assert got[:4] == sequence[len(PROMPT[0]) :]


@pytest.mark.slow
def test_a_verification_decides_what_the_logits_are(model: Model) -> None:
    """Rounds that verify with the negative of the last states take what the target likes least."""

    def contrary(*arguments: Any, **options: Any) -> Any:
        hidden, cache, info = forward(*arguments, **options)
        return -hidden, cache, info

    own = tokens(model, tree=TREE)
    got = tokens(model, tree=TREE, adapt=lambda method: dataclasses.replace(method, target_forward=contrary))
    assert own == tokens(model, tree=None)
    assert got[0] == own[0] and got[1:] != own[1:]


def test_equal_functions_are_the_same_program_and_nothing_is_claimed(model: Model) -> None:
    def as_it_is(method: Speculative) -> Speculative:
        return dataclasses.replace(method, accept=rule)

    def rule(tree: Tree, logits: jax.Array, key: jax.Array, history: History) -> Accepted:
        return accept_rule(SamplingConfig(), TREE.longest_path)(tree, logits, key, history)

    first = model.generate(PROMPT, max_new_tokens=NEW, ignore_eos=True, tree=TREE, adapt=as_it_is)
    compiled = len(model.programs)
    second = model.generate(PROMPT, max_new_tokens=NEW, ignore_eos=True, tree=TREE, adapt=as_it_is)
    assert len(model.programs) == compiled and second.compile_s == 0
    assert first.prompts[0].token_ids == second.prompts[0].token_ids == tokens(model, tree=TREE)
    assert not first.exact


def test_plain_decoding_has_no_round_to_adapt(model: Model) -> None:
    with pytest.raises(RequestError, match="adapt; this is plain decoding"):
        tokens(model, tree=None, adapt=lambda method: method)
