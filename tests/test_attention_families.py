"""Families whose attention has forms of its own, against transformers, and that every path has these forms."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from attention_models import FAMILIES, draw_fields
from driver import build, cached_logits, continue_greedily, random_tensors
from hf_models import hf_greedy, hf_logits, write_checkpoint
from published import same
from safetensors.numpy import load_file
from speculation import FastPrograms, decode, draft_config, plainly, small_head, speculating
from test_parity import quiet, reference_logits  # noqa: F401

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_source
from moespec_jax.checkpoint.write import export
from moespec_jax.config import TreeConfig
from moespec_jax.nn.backend import BACKENDS

TOLERANCE = 5e-5  # on logits of standard deviation 1
TOKENS = 24  # longer than every window, and than the context
DRAWS = 20
QUICK = ["gpt_oss-0", "gpt_oss-1", *(f"{family}-{1 + number}" for number, family in enumerate(FAMILIES[1:]))]


def random_ids(number: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 64, (batch, TOKENS))


@pytest.mark.torch
@pytest.mark.slow_except(*QUICK)
@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, number: int, tmp_path: Path) -> None:
    """Without a cache, and compiled with one, by the back-ends in turn."""
    pytest.importorskip("torch")
    fields, ids = draw_fields(family, number), random_ids(number)
    model = write_checkpoint(tmp_path, fields, seed=number)
    expected = hf_logits(model, ids)
    assert 0.3 < expected.std() < 3
    config = load_config(tmp_path)
    params = load_parameters(tmp_path, config, BACKENDS["switch"], jnp.float32)
    np.testing.assert_allclose(reference_logits(config, params, ids), expected, atol=TOLERANCE, rtol=0)
    backend = BACKENDS[("slots", "pallas", "switch", "dense")[number % 4]]
    params = load_parameters(tmp_path, config, backend, jnp.float32)
    np.testing.assert_allclose(cached_logits(config, params, backend, ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.torch
@pytest.mark.slow_except("gpt_oss")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_there_and_back(family: str, tmp_path: Path) -> None:
    """Three prompts of different lengths as one batch; and through orbax to a directory equal to the bytes."""
    pytest.importorskip("torch")
    fields = draw_fields(family, 0) | dict(max_position_embeddings=128, tie_word_embeddings=False)
    model = write_checkpoint(tmp_path / "a", fields, seed=7)
    prompts = [random_ids(7, 3)[row, :length].tolist() for row, length in enumerate((9, 2, 6))]
    config, backend = load_config(tmp_path / "a"), BACKENDS["switch"]
    params = load_parameters(tmp_path / "a", config, backend, jnp.float32)
    ours = continue_greedily(config, params, backend, prompts, new=64)
    assert ours == hf_greedy(model, prompts, new=64)
    assert len({tuple(row) for row in ours}) == 3 and len(set(sum(ours, []))) > 5
    write_orbax(open_source(tmp_path / "a", config), config, tmp_path / "b")
    again = load_parameters(tmp_path / "b", config, backend, jnp.float32)
    assert same(again, params)
    export(again, config, tmp_path / "c", "float32", extra={"eos_token_id": 3})
    assert load_config(tmp_path / "c") == config
    before, back = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert back.keys() == before.keys()
    for name, value in before.items():
        assert (back[name].shape, back[name].tobytes()) == (value.shape, value.tobytes()), name


@pytest.mark.slow_except("gpt_oss-slots")
@pytest.mark.parametrize("backend", ["slots", "switch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_gives_the_tokens_of_plain_decoding(family: str, backend: str) -> None:
    fields = draw_fields(family, 0) | dict(vocab_size=16, num_experts_per_tok=2)
    config = read_config(fields)
    params = build(config, random_tensors(config, 3), BACKENDS[backend])
    draft = draft_config(config, draft_vocab_size=16)
    head, prompts = small_head(draft, params), [[1, 2, 3, 4, 5], [7], [3, 6] * 6]
    plain = decode(plainly(config, params, BACKENDS[backend]), FastPrograms(), prompts, 20)
    # Most of the vocabulary: even a random head is right now and then.
    drafted = speculating(config, params, BACKENDS[backend], draft, head, TreeConfig(1, 14, 18))
    run = decode(drafted, FastPrograms(), prompts, 20)
    assert run.sequences == plain.sequences
    assert run.accepted.sum() > 3
