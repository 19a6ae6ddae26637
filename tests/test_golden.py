"""Logits and greedy tokens of committed checkpoints, as transformers computed them.

Neither torch nor transformers is needed. The checkpoints are made by `golden/make_golden.py`.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from driver import cached_logits, continue_greedily

from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.nn.backend import BACKENDS

DIRECTORIES = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/expected.npz"))


def test_every_family_is_there() -> None:
    forms = ["flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe", "phimoe"]
    assert [path.name for path in DIRECTORIES] == [*forms, "qwen2_moe", "qwen3_moe"]


@pytest.mark.slow_except("olmoe-slots", "mixtral-switch", "gpt_oss-slots", "glm4_moe-slots", "llama4_text-switch")
@pytest.mark.parametrize("name", ["switch", "slots"])
@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_golden(directory: Path, name: str) -> None:
    expected, backend = np.load(directory / "expected.npz"), BACKENDS[name]
    config = load_config(directory)
    params = load_parameters(directory, config, backend, jnp.float32)
    ids = expected["ids"]
    logits = cached_logits(config, params, backend, ids)
    # On logits of standard deviation 1; the two programs sum in different orders.
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-5, rtol=0)
    prompts = [row[:length].tolist() for row, length in zip(ids, expected["prompt_lengths"], strict=True)]
    new = expected["greedy"].shape[1]
    assert continue_greedily(config, params, backend, prompts, new, slots=64) == expected["greedy"].tolist()
