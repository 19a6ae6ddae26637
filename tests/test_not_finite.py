"""Weights that are not finite give no text: one line says so."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_pair import write_pair

from moespec_jax.generate import main


@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_no_text_comes_of_it(name: str, draft: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = write_pair(tmp_path, 4)
    file = Path(pair[1]) / "model.safetensors"
    tensors = load_file(file)
    tensors[name].flat[3] = np.nan
    save_file(tensors, file)
    head = pair[2:4] if draft else ["--draft-model", "none"]
    assert main([*pair[:2], *head, *pair[4:], "--prompt-ids", "5,17,9"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: expected finite logits")
