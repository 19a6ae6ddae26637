"""The text is a function of the seed: the same sampled tokens with any tree and without one, alone and in a batch, in
one call and in many; and every one of them as NumPy draws it."""

import dataclasses

import jax
import numpy as np
import oracles
import pytest
import tree_oracle
from driver import cached_logits, fast_jit
from speculation import Decoding, FastPrograms, decode, plainly, speculating
from test_speculate import CHAIN, PROMPTS, SMALL, every_family, pair, plain_tokens

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.runtime.run import Batch, Run

NEW = 100
TREES = {"16/4/4": SMALL, "chain of 4": CHAIN}
SAMPLINGS = {
    "1": SamplingConfig(1.0),
    "0.7": SamplingConfig(0.7),
    "1 cut": SamplingConfig(1.0, 9, 0.9),
    "0.7 cut": SamplingConfig(0.7, 5, 0.95),
}


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree", TREES)
def test_sampled_output_is_plain_decoding_s(family: str, sampling: str, tree: str) -> None:
    """Three sequences that progress at their own speed, in one call and in a call for every round; and the first one
    alone, as it is the first in both batches."""
    plain = plain_tokens(family, "switch", NEW, SAMPLINGS[sampling])
    decoding, programs = speculating(*pair(family), TREES[tree], SAMPLINGS[sampling]), FastPrograms()
    run = decode(decoding, programs, PROMPTS, NEW)
    assert run.sequences == plain and run.accepted.sum() > 5
    alone = decode(decoding, programs, PROMPTS[:1], NEW)
    assert alone.sequences == plain[:1]
    pieces = Run(programs, *decoding, Batch(PROMPTS, [len(p) + NEW for p in PROMPTS], (), 0))
    pieces.execute(on_round=lambda number, info: None)
    assert pieces.sequences == plain


def numpy_draws(sampling: SamplingConfig, seed: int, sequences: list[list[int]]) -> list[list[int]]:
    """Tokens that follow each prefix of each sequence, drawn in NumPy from one pass over the whole texts: the largest
    sum of log-probability and Gumbel noise of seed, number of the sequence, and position."""
    config, params, backend, *_ = pair()
    longest = max(map(len, sequences))
    ids = np.array([text + [0] * (longest - len(text)) for text in sequences], np.int32)
    logits, drawn = cached_logits(config, params, backend, ids).astype(np.float64), []
    for number, rows in enumerate(logits):
        key = jax.random.fold_in(jax.random.key(seed), number)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(1, longest + 1))
        noise = np.asarray(jax.vmap(lambda k: jax.random.gumbel(k, (config.vocab_size,)))(keys))
        settings = (sampling.temperature, sampling.top_k, sampling.top_p)
        p = np.array([oracles.token_distribution(row.tolist(), *settings) for row in rows])
        with np.errstate(divide="ignore"):
            drawn.append(np.argmax(np.log(p) + noise, axis=1).tolist())
    return drawn


def test_every_token_is_the_one_that_numpy_draws() -> None:
    """Prompts of unequal length in a batch: a position counts from the beginning of its own sequence."""
    sampling, seed, new = SamplingConfig(0.9, 11, 0.95), 11, 40
    run = decode(speculating(*pair(), TreeConfig(1, 3, 7), sampling), FastPrograms(), PROMPTS, new, seed=seed)
    assert run.sequences == decode(plainly(*pair()[:3], sampling), FastPrograms(), PROMPTS, new, seed=seed).sequences
    for ids, drawn, prompt in zip(run.sequences, numpy_draws(sampling, seed, run.sequences), PROMPTS, strict=True):
        assert ids[len(prompt) :] == drawn[len(prompt) - 1 : len(ids) - 1]
    assert run.accepted.sum() > 5


def drafted(decoding: Decoding, sampling: SamplingConfig) -> tuple[dict[tuple[int, ...], float], int]:
    """Scores of all paths of a complete tree of two levels that is drafted for draws of `sampling`, and the position of
    its first token."""
    run = Run(FastPrograms(), *decoding, Batch(PROMPTS[:1], [40], (), 5))
    state = dataclasses.replace(run.state_after(2), sampling=sampling)
    trees, _ = fast_jit(decoding.method.propose)(decoding.params, state)
    tokens, parents, scores = (part[0].tolist() for part in trees)
    paths = [tuple(tokens[i] for i in tree_oracle.path_to(parents, node)[1:]) for node in range(len(tokens))]
    return dict(zip(paths, scores, strict=True)), int(state.decoding.length[0])


def test_drafts_share_the_noise_of_the_draws() -> None:
    """The head's logits, over the temperature, with the noise of their position: in NumPy from the greedy tree's."""
    draft, sampling = pair()[3], SamplingConfig(0.6, 3, 0.9)
    width = draft.draft_vocab_size
    decoding = speculating(*pair(), TreeConfig(1, width, 1 + width + width**2), sampling)
    (plain, position), (scores, _) = drafted(decoding, SamplingConfig()), drafted(decoding, sampling)
    key = jax.random.fold_in(jax.random.key(5), 0)
    assert len(scores) == 1 + width + width**2 and scores.keys() == plain.keys()
    for path in [(), *(path for path in plain if len(path) == 1)]:
        children = [other for other in plain if other[:-1] == path and len(other) > len(path)]
        noise = jax.random.gumbel(jax.random.fold_in(key, position + len(path)), (pair()[0].vocab_size,))
        row = np.array([(plain[child] - plain[path]) / 0.6 + float(noise[child[-1]]) for child in children])
        expected = scores[path] + row - np.log(np.exp(row).sum())
        np.testing.assert_allclose([scores[child] for child in children], expected, atol=1e-4)  # sums of float32
