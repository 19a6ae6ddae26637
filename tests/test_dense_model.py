"""A model of these families without a sparse layer: `mlp_only_layers` may name every layer, or `decoder_sparse_step` be
larger than their number. It decodes plainly and speculatively, and is refused a budget of experts."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from driver import cached_logits
from hf_models import Fields, draw_fields, hf_logits, write_checkpoint
from tiny_pair import run_json, write_pair

from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.generate import main
from moespec_jax.nn.backend import BACKENDS

# For 3 layers.
DENSE: dict[str, Fields] = {
    "named": {"mlp_only_layers": [0, 1, 2]},
    "by step": {"decoder_sparse_step": 4},
    "both": {"mlp_only_layers": [1, 2, 7], "decoder_sparse_step": 2},
}


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.slow
@pytest.mark.parametrize("how", DENSE)
def test_plainly_and_speculatively(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path, 8, **DENSE[how])
    assert load_config(tmp_path / "target").num_sparse_layers == 0
    plain, drafted = (run_json(capsys, *flags, "--prompt-ids", "5,17,9") for flags in (pair[:2] + pair[4:], pair))
    assert plain["prompts"][0]["token_ids"] == drafted["prompts"][0]["token_ids"]
    for result in (plain, drafted):
        assert result["exact"] and result["experts_wanted"] == result["experts_read"] == 0
    assert main([*pair, "--prompt-ids", "5,17,9", "--expert-budget", "2"]) == 2
    assert "expected a model with experts to budget; it has none" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.slow_except("qwen2_moe-switch")
@pytest.mark.parametrize(("family", "backend"), [("qwen3_moe", "slots"), ("qwen2_moe", "switch")])
def test_logits_as_in_transformers(family: str, backend: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    fields = draw_fields(family, 1) | {"mlp_only_layers": [0, 1]}
    model = write_checkpoint(tmp_path, fields, seed=1)
    config, ids = load_config(tmp_path), np.random.default_rng(1).integers(0, 64, (2, 9))
    params = load_parameters(tmp_path, config, BACKENDS[backend], jnp.float32)
    assert params.experts == ()
    logits = cached_logits(config, params, BACKENDS[backend], ids)
    np.testing.assert_allclose(logits, hf_logits(model, ids), atol=5e-5, rtol=0)  # as in test_parity.py
