"""Text models that are published inside a model of text and images: their part is read, and the rest left out."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_models import draw_fields
from published import draw_tensors, same, write
from test_parity import quiet, reference_logits  # noqa: F401

from convert import to_hf
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.quantized.detect import stored_format
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.checkpoint.tokenizer import read_stop_ids
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.nn.backend import BACKENDS

TEXT = draw_fields("llama4_text", 0) | dict(tie_word_embeddings=False)
WHOLE: dict[str, Any] = dict(
    model_type="llama4", text_config=TEXT, vision_config=dict(model_type="llama4_vision_model", hidden_size=16),
    architectures=["Llama4ForConditionalGeneration"], image_token_index=60, eos_token_id=[3, 5], dtype="float32",
)  # fmt: skip
IMAGES = ("vision_model.patch_embedding.linear.weight", "multi_modal_projector.linear_1.weight")


def write_whole(directory: Path, **more: np.ndarray) -> Path:
    tensors = {f"language_model.{name}": value for name, value in draw_tensors(TEXT).items()}
    return write(directory, WHOLE, tensors | {name: np.ones((3, 2), np.float32) for name in IMAGES} | more)


def test_the_text_model_is_that_of_its_own_files(tmp_path: Path) -> None:
    whole, text = write_whole(tmp_path / "whole"), write(tmp_path / "text", TEXT, draw_tensors(TEXT))
    config = load_config(whole)
    assert config == load_config(text) and read_stop_ids(whole) == (3, 5) and stored_format(whole) is None
    got, expected = (load_parameters(d, config, BACKENDS["slots"], "float32") for d in (whole, text))
    assert same(got, expected)


def test_a_conversion_writes_the_text_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, output = write_whole(tmp_path / "whole"), tmp_path / "hf"
    monkeypatch.setattr(sys, "argv", ["to_hf", "--model", str(whole), "--output", str(output)])
    assert to_hf.main() == 0
    fields, config = json.loads((output / "config.json").read_text()), load_config(whole)
    assert fields["model_type"] == "llama4_text" and fields["architectures"] == ["Llama4ForCausalLM"]
    got, expected = (load_parameters(d, config, BACKENDS["slots"], "float32") for d in (output, whole))
    assert load_config(output) == config and same(got, expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("language_model.model.layers.0.feed_forward.extra.weight", "1 unknown: model.layers.0.feed_forward.extra"),
        ("model.embed_tokens.weight", "1 doubly assigned: model.embed_tokens.weight"),
        ("audio_model.conv.weight", "1 unknown: audio_model.conv.weight"),
    ],
)
def test_other_tensors_are_named(name: str, said: str, tmp_path: Path) -> None:
    whole = write_whole(tmp_path, **{name: np.ones((64, 24), np.float32)})
    with pytest.raises(CheckpointError, match=said):
        load_parameters(whole, load_config(whole), BACKENDS["slots"], "float32")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(text_config=None), "expected text_config of llama4 to describe a llama4_text; config.json has None"),
        (dict(text_config=[TEXT]), "expected text_config to be an object"),
        (dict(text_config=TEXT | dict(model_type="olmoe")), "llama4_text; config.json has 'olmoe'"),
        (dict(text_config=TEXT | dict(attention_chunk_size=0)), "attention_chunk_size"),
        (dict(quantization_config=dict(quant_method="x")), "quant_method 'x' is not supported"),
    ],
)
def test_a_config_without_a_text_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedConfig, match=said):
        read_config(WHOLE | changes)


@pytest.mark.torch
def test_logits_are_those_of_the_published_class(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    more = dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16, patch_size=14)
    torch.manual_seed(0)
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=TEXT, vision_config=sizes | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama4"
    ids = np.random.default_rng(0).integers(0, 60, (2, 24))
    with torch.no_grad():
        expected = model.language_model(torch.from_numpy(ids)).logits.float().numpy()
    config: DecoderConfig = load_config(tmp_path)
    params = load_parameters(tmp_path, config, BACKENDS["switch"], "float32")
    np.testing.assert_allclose(reference_logits(config, params, ids), expected, atol=5e-5 * expected.std(), rtol=0)
