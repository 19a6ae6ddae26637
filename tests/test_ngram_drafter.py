"""Drafts by n-grams against plain Python, and the contract of their trees."""

import math
from functools import cache
from typing import Any

import jax.numpy as jnp
import ngram_oracle
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
from moespec_jax.decoding.ngram_drafter import ABSENT, CONTINUATIONS, NgramDrafter, draft_continuations
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.runtime.run import Batch, Run

CHAIN, TREE = TreeConfig(3, 1, 5), TreeConfig(4, 2, 9)
LONGEST = 4


@cache
def drafts(tree: TreeConfig) -> Any:
    return fast_jit(lambda tokens, length: draft_continuations(tree, LONGEST, tokens, length))


def random_text(rng: np.random.Generator) -> list[int]:
    """A text of few different tokens, in which parts of itself occur again."""
    text = rng.integers(0, int(rng.integers(1, 5)), int(rng.integers(1, 9))).tolist()
    while len(text) < 40 and rng.random() < 0.8:
        start = int(rng.integers(len(text)))
        text += text[start : start + int(rng.integers(1, 9))] + rng.integers(0, 4, int(rng.integers(0, 2))).tolist()
    return text[: int(rng.integers(1, 1 + len(text)))]


def drafted(tree: TreeConfig, text: list[int], slots: int = 48) -> tuple[list[int], list[int], list[float]]:
    """Tokens, parents and scores of a draft; what follows the text in its buffer is another text that matches too."""
    buffer = (text * slots)[:slots]
    found = drafts(tree)(jnp.asarray(buffer, jnp.int32), jnp.int32(len(text)))
    return tuple(part.tolist() for part in found)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("tree", [CHAIN, TREE, TreeConfig(0, 4, 3), TreeConfig(2, 3, 8)], ids=lambda tree: tree.name)
def test_nodes_are_the_most_probable_continuations(tree: TreeConfig) -> None:
    rng, absent, whole = np.random.default_rng(0), 0, 0
    count = 1 if tree.top_k == 1 else max(CONTINUATIONS * tree.top_k, -(-(tree.size - 1) // (tree.depth + 1)))
    for _ in range(100):
        text = random_text(rng)
        tokens, parents, scores = drafted(tree, text)
        known = ngram_oracle.nodes(text, LONGEST, tree.depth, count)
        real = [i for i in range(1, tree.size) if scores[i] != ABSENT]
        assert tokens[0] == text[-1] and parents[0] == -1 and scores[0] == 0
        assert len(real) == min(tree.size - 1, len(known))
        for i in real:
            path = tree_oracle.path_to(parents, i)
            assert path[0] == 0 and parents[i] < i and scores[i] < scores[parents[i]]
            # Sums and logarithms of float32.
            assert math.isclose(known.pop(tuple(tokens[n] for n in path[1:])), math.exp(scores[i]), rel_tol=1e-5)
        least = min((math.exp(scores[i]) for i in real), default=0.0)
        assert all(p <= least * (1 + 1e-5) for p in known.values())
        for i in set(range(1, tree.size)) - set(real):
            assert (tokens[i], parents[i]) == (text[-1], -1)
        absent, whole = absent + (len(real) < tree.size - 1), whole + (len(real) == tree.size - 1)
    assert absent and whole


def test_of_equal_matches_a_chain_drafts_the_latest_and_goes_round() -> None:
    assert drafted(CHAIN, [1, 2, 3, 1, 2, 4, 1, 2])[0] == [2, 4, 1, 2, 4]
    assert drafted(CHAIN, [7, 1, 2, 3, 5, 2, 4, 1, 2])[0] == [2, 3, 5, 2, 4]
    assert drafted(CHAIN, [6, 6])[0] == [6] * 5 and drafted(CHAIN, [6])[1] == [-1] * 5


def looking_up(family: str, backend: str, tree: TreeConfig, sampling: SamplingConfig = GREEDY) -> Decoding:
    config, params, form, *_ = pair(family, backend)
    accept = accept_rule(sampling, tree.longest_path)
    method = Speculative(Autoregressive(config, sampling, form), NgramDrafter(LONGEST), tree, accept)
    return Decoding(method, SpeculativeParams(params, ()))


@pytest.mark.slow_except("0.0-9/4/2-olmoe")
@every_family
@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=lambda tree: tree.name)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_plain_decoding_s(family: str, tree: TreeConfig, temperature: float) -> None:
    """In a batch, in one call and in many."""
    new, sampling, programs = 60, SamplingConfig(temperature), FastPrograms()
    plain = plain_tokens(family, "switch", new, sampling)
    decoding = looking_up(family, "switch", tree, sampling)
    run = decode(decoding, programs, PROMPTS, new)
    assert run.sequences == plain and run.accepted.sum() > 5
    pieces = Run(programs, *decoding, Batch(PROMPTS, [len(p) + new for p in PROMPTS], (), 0))
    pieces.execute(on_round=lambda number, info: None)
    assert pieces.sequences == plain


def test_copies_of_the_root_read_no_further_experts() -> None:
    """After two tokens that differ there is nothing to draft, and a round reads the experts of one token."""
    decoding, seen = looking_up("qwen3_moe", "switch", TREE), []
    assert isinstance(decoding.method.drafter, Drafter)
    run = Run(FastPrograms(), *decoding, Batch([[7]], [5], (), 0))
    run.execute(on_round=lambda number, info: seen.append(info))
    root = run.sequences[0][1]
    assert run.sequences[0] == plain_tokens("qwen3_moe", "switch", 60)[1][:5]
    assert root != 7 and (seen[0].tree.parents == -1).all() and (seen[0].tree.tokens == root).all()
    assert seen[0].selected.sum(axis=2).max() == pair()[0].num_experts_per_tok
