"""DFlash and DSpark heads against one in NumPy, in every variant: the pass over a block, a context that grows by what
rounds accept, and the chain that is drawn."""

import dataclasses
from typing import Any

import dflash_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dflash_oracle import BASE, BLOCK, VARIANTS, VOCAB
from driver import fast_jit

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.accept import Accepted
from moespec_jax.decoding.dflash_drafter import DFlashDrafter
from moespec_jax.decoding.drafter import SpeculationState, SpeculativeParams
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.states import DecodeState
from moespec_jax.decoding.waiting import HeadState
from moespec_jax.nn.cache import Cache, empty_cache
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.dflash import block_forward, block_logits, extend_context, fuse_context

TOLERANCE = 1e-5  # float32 against float64, on values of about 1
TOKENS, LENGTHS = 24, (9, 6)  # tokens of a sequence; of the prompts
KEY = jax.random.key(3)


def sequences(config: Any, width: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, their auxiliary hidden states, and an embedding."""
    rng = np.random.default_rng(1)
    aux = rng.normal(size=(width, TOKENS, config.aux_size)).astype(np.float32)
    embedding = rng.normal(size=(VOCAB, config.target_hidden_size)).astype(np.float32)
    return rng.integers(0, VOCAB, (width, TOKENS)), aux, embedding


def expected_block(config: Any, head: Any, ids: np.ndarray, aux: np.ndarray, embedding: Any, root: int) -> np.ndarray:
    """Outputs of the block whose newest token is at position `root`, in NumPy."""
    rows = np.asarray(embedding)[[ids[root], *[config.mask_token_id] * (config.block_size - 1)]]
    return oracle.block(config, head, oracle.features(config, head, aux[:root].astype(np.float64)), rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_equals_the_reference(variant: str) -> None:
    """Its context read in two pieces; the sequences of a batch have contexts of unequal length."""
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    head = oracle.head_of(config)
    ids, aux, embedding = sequences(config)
    embed = embedding if head.embed is None else head.embed
    roots = np.array(LENGTHS, np.int32)

    @fast_jit
    def run(head: Any, aux: jax.Array, embedded: jax.Array) -> Any:
        cache = empty_cache(config, 2, TOKENS + BLOCK, jnp.float32, stacked=False)
        for start, stop in ((0, 5), (5, 12)):
            cache = dataclasses.replace(cache, length=jnp.full((2,), start, jnp.int32))
            positions = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32)[None, :], (2, stop - start))
            cache = extend_context(config, head, fuse_context(config, head, aux[:, start:stop]), positions, cache)
        cache = dataclasses.replace(cache, length=jnp.asarray(roots))
        positions = jnp.asarray(roots)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
        hidden, _ = block_forward(config, head, embedded, positions, cache)
        return hidden, block_logits(head, hidden)

    rows = [[ids[b, root], *[config.mask_token_id] * (BLOCK - 1)] for b, root in enumerate(roots)]
    hidden, logits = run(head, jnp.asarray(aux), jnp.asarray(np.asarray(embed)[rows]))
    for b, root in enumerate(roots):
        expected = expected_block(config, head, ids[b], aux[b], embed, int(root))
        assert 0.2 < expected.std() < 5
        np.testing.assert_allclose(hidden[b], expected, atol=TOLERANCE, rtol=0)
        scores = expected @ np.asarray(head.lm_head, np.float64).T
        np.testing.assert_allclose(logits[b], scores, atol=5 * TOLERANCE, rtol=0)


def test_every_variant_changes_the_outputs() -> None:
    """So that none of them passes above for having no effect."""
    seen: list[np.ndarray] = []
    for variant in ("base", "windows", "windows of each row"):
        config = dataclasses.replace(BASE, **VARIANTS["windows"] | VARIANTS[variant])
        if variant == "base":
            config = dataclasses.replace(config, sliding_windows=(0, 0, 0), causal=(False,) * 3)
        ids, aux, embedding = sequences(config)
        seen.append(expected_block(config, oracle.head_of(config), ids[0], aux[0], embedding, LENGTHS[0]))
    assert min(np.abs(one - other).max() for i, one in enumerate(seen) for other in seen[:i]) > 1e-3


def speculation(config: Any, head: Any, drafter: Any, embedding: Any, sampling: SamplingConfig) -> Any:
    """Parameters, and the state after a prompt that was read in two chunks."""
    target = Decoder(jnp.asarray(embedding), layers=(), experts=None, norm=jnp.ones(embedding.shape[1]), lm_head=None)
    params, lengths = SpeculativeParams(target, head), jnp.asarray(LENGTHS, jnp.int32)
    ids, aux, _ = sequences(config)
    state = drafter.init(params, 2, TOKENS + 2 * BLOCK)
    for start in (0, 6):
        part = slice(start, start + 6)
        state = drafter.read(
            params, state, jnp.asarray(ids[:, part], jnp.int32), jnp.asarray(aux[:, part]), jnp.int32(start), lengths
        )
    return params, drafter.begin(TreeConfig(BLOCK - 1, 1, BLOCK + 1), state, lengths)


def decode_state(ids: np.ndarray, lengths: list[int]) -> DecodeState:
    """Sequences of which so many tokens are known."""
    none = Cache((), (), jnp.zeros((2,), jnp.int32))
    limits = jnp.full((2,), TOKENS, jnp.int32)
    return DecodeState(
        jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.asarray(LENGTHS, jnp.int32), limits,
        jnp.zeros((2,), bool),
        jnp.zeros((0,), jnp.int32), KEY, none,
    )  # fmt: skip


@pytest.mark.slow_except("windows-0.0", "vanilla-0.7")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("variant", ["base", "windows", "vanilla", "gated", "rnn", "confidence alone"])
def test_chains_of_growing_contexts_equal_the_reference(variant: str, temperature: float) -> None:
    """Rounds that accept different numbers of tokens in each sequence, with one of plain decoding between them."""
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    head, drafter, sampling = oracle.head_of(config), DFlashDrafter(config), SamplingConfig(temperature)
    ids, aux, embedding = sequences(config)
    params, state = speculation(config, head, drafter, embedding, sampling)
    tree = config.whole_block
    propose = fast_jit(lambda params, state: drafter.propose(tree, params, state))
    lengths = [length + 1 for length in LENGTHS]
    for gained in ((1, 3), (4, 1), None, (2, 5), (1, 1)):
        if gained is None:
            rows = jnp.stack([jnp.asarray(aux[b, lengths[b] - 1 : lengths[b]]) for b in range(2)])
            state = drafter.skip(state, jnp.asarray(lengths, jnp.int32) - 1, rows)
            lengths = [length + 1 for length in lengths]
            continue
        whole = SpeculationState(decode_state(ids, lengths), state, jnp.ones(1), sampling)
        trees, whole = propose(params, whole)
        for b, length in enumerate(lengths):
            hidden = expected_block(config, head, ids[b], aux[b], embedding, length - 1)
            expected = oracle.chain(config, head, hidden, int(ids[b, length - 1]), *drawing(b, length, temperature))
            assert trees.tokens[b].tolist() == [ids[b, length - 1], *expected[0]]
            assert trees.parents[b].tolist() == list(range(-1, config.drafted))
            np.testing.assert_allclose(trees.scores[b], [0.0, *expected[1]], atol=1e-4)  # sums of float32 logarithms
        count = jnp.asarray(gained, jnp.int32)
        steps = jnp.arange(tree.longest_path, dtype=jnp.int32)[None, :]
        accepted = Accepted(jnp.minimum(steps, count[:, None] - 1), count, count)
        nodes = jnp.stack([jnp.asarray(padded(aux[b, lengths[b] - 1 :], tree.size)) for b in range(2)])
        state = drafter.commit(whole.draft, accepted, nodes)
        lengths = [length + more for length, more in zip(lengths, gained, strict=True)]
    assert isinstance(state, HeadState)


def padded(rows: np.ndarray, count: int) -> np.ndarray:
    """The first rows, and zeros behind them."""
    return np.concatenate([rows[:count], np.zeros((max(count - len(rows), 0), rows.shape[1]), np.float32)])


def drawing(sequence: int, length: int, temperature: float) -> tuple[Any, float]:
    """Noise of the draws after a token, and the factor of the logits."""
    if temperature == 0.0:
        return None, 1.0
    key = jax.random.fold_in(KEY, sequence)
    keys = [jax.random.fold_in(key, length + i) for i in range(BLOCK)]
    return np.array([np.asarray(jax.random.gumbel(k, (VOCAB,))) for k in keys]), 1 / temperature


@pytest.mark.slow
def test_a_shorter_chain_is_the_beginning_of_the_block() -> None:
    config = dataclasses.replace(BASE, **VARIANTS["vanilla"])
    drafter, sampling = DFlashDrafter(config), SamplingConfig()
    ids, _, embedding = sequences(config)
    params, state = speculation(config, oracle.head_of(config), drafter, embedding, sampling)
    whole = SpeculationState(decode_state(ids, [length + 1 for length in LENGTHS]), state, jnp.ones(1), sampling)
    longest, _ = fast_jit(lambda: drafter.propose(config.whole_block, params, whole))()
    for tree in (TreeConfig(0, 1, 2), TreeConfig(9, 1, 3)):
        shorter, _ = fast_jit(lambda tree=tree: drafter.propose(tree, params, whole))()
        for one, other in zip(shorter, longest, strict=True):  # scores are sums of other programs
            np.testing.assert_allclose(one, other[:, : tree.size], atol=1e-5)


@pytest.mark.parametrize("tree", [TreeConfig(5, 1, 7), TreeConfig(1, 2, 4)], ids=str)
def test_other_trees_are_refused(tree: TreeConfig) -> None:
    with pytest.raises(ValueError, match=r"expected a chain \(top-k 1\) of at most 5 tokens.* block of 5 drafts; got"):
        BASE.check_chain(tree)
