"""gpt-oss's MXFP4 experts: blocks and scales of all experts of a layer in two tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
from packed_writer import E2M1
from published import Tensors, draw_tensors, same
from quantized_writer import SHARD
from safetensors.numpy import save_file

from moespec_jax.checkpoint.quantized.fp4 import mxfp4_scheme
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS

FIELDS = {
    **{"model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3},
    **{"num_experts_per_tok": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
}
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def draw_blocks(random: np.random.Generator, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of three experts."""
    blocks = random.integers(0, 256, (3, out, inner // 32, 16)).astype(np.uint8)
    return blocks, random.integers(118, 126, (3, out, inner // 32)).astype(np.uint8)


def stands_for(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights `[experts, out, in]`, by the format's definition."""
    values = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
    wide = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return wide.reshape(*scales.shape[:2], -1)


def write(directory: Path) -> tuple[Path, Path, Tensors]:
    """A quantized checkpoint, the plain one of the same weights, and the stored tensors of the former."""
    random = np.random.default_rng(0)
    plain = {name: value for name, value in draw_tensors(FIELDS).items() if ".experts." not in name}
    stored = dict(plain)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        for name, out, inner in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            blocks, scales = draw_blocks(random, out, inner)
            bias = random.standard_normal((3, out)).astype(np.float32)
            stored |= {f"{at}{name}_blocks": blocks, f"{at}{name}_scales": scales, f"{at}{name}_bias": bias}
            # Published in bfloat16, a matrix is stored with its inputs first.
            plain |= {f"{at}{name}": stands_for(blocks, scales).swapaxes(1, 2).copy(), f"{at}{name}_bias": bias}
    for name, tensors, more in (("quantized", stored, {"quantization_config": SECTION}), ("plain", plain, {})):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(FIELDS | more))
        save_file(tensors, directory / name / SHARD)
    return directory / "quantized", directory / "plain", stored


@pytest.mark.parametrize("backend", ["slots", "switch"])
def test_experts_are_those_of_the_plain_checkpoint(backend: str, tmp_path: Path) -> None:
    quantized, plain, _ = write(tmp_path)
    for dtype in ("float32", "bfloat16"):
        got, expected = (load_parameters(d, load_config(d), BACKENDS[backend], dtype) for d in (quantized, plain))
        assert same(got, expected)


def test_codes_and_scales_are_what_transformers_reads() -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(1)
    blocks = random.permutation(np.arange(3 * 256 * 16) % 256).astype(np.uint8).reshape(3, 64, 4, 16)
    scales = (np.arange(3 * 64 * 4) % 255).astype(np.uint8).reshape(3, 64, 4)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    got = np.empty((3, 64, 128), np.float32)
    for expert in range(3):
        with np.errstate(over="ignore"):
            mxfp4_scheme("b", "s").dequantize({"b": blocks[expert].reshape(64, 64), "s": scales[expert]}, got[expert])
    np.testing.assert_array_equal(got, expected.numpy().swapaxes(1, 2))


BAD: dict[str, tuple[str, np.ndarray | None, str]] = {
    "no scales": ("_scales", None, f"1 missing beside quantized weights: {GATE_UP}_scales .{SHARD}"),
    "misshapen blocks": ("_blocks", np.zeros((3, 64, 2, 8), np.uint8), rf"{GATE_UP}_blocks .expected \[3, 64, 2, 16\]"),
    "scale is NaN": ("_scales", np.full((3, 64, 2), 255, np.uint8), f"expected finite scales in {GATE_UP}_scales; got"),
    "scales of floats": ("_scales", np.ones((3, 64, 2), np.float32), f"1 not U8: {GATE_UP}_scales .F32"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tensor_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    suffix, value, message = BAD[name]
    quantized, _, stored = write(tmp_path)
    rest = {key: kept for key, kept in stored.items() if key != GATE_UP + suffix}
    save_file(rest if value is None else rest | {GATE_UP + suffix: value}, quantized / SHARD)
    with pytest.raises(CheckpointError, match=message) as found:
        load_parameters(quantized, load_config(quantized), BACKENDS["slots"], "float32")
    assert "\n" not in str(found.value) and SHARD in str(found.value)
