"""Checkpoints with quantized weights load as the weights that their format stands for, or are refused by name."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from packed_writer import AWQ, FORM, GPTQ, PACKED, ints
from published import Tensors, same
from quantized_writer import BLOCKS, FP8, SHARD, Case, group, modelopt, write_quantized
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import CONFIG

from convert import check, to_hf, to_orbax
from moespec_jax.checkpoint.families.table import read_config
from moespec_jax.checkpoint.quantized.detect import read_format
from moespec_jax.checkpoint.quantized.fp8 import fp8_scheme
from moespec_jax.checkpoint.quantized.join import join_components
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.checkpoint.shards import read_headers, read_tensors
from moespec_jax.checkpoint.tensor_table import Tensor
from moespec_jax.errors import CheckpointError, UnsupportedConfig
from moespec_jax.nn.backend import BACKENDS

GOLDEN = Path(__file__).parent / "golden" / "quantized"
CASES: dict[str, Case] = FP8 | PACKED
SLOTS = BACKENDS["slots"]
GATE = "model.layers.1.mlp.experts.2.gate_proj"


def load(directory: Path, dtype: str = "float32", **more: Any) -> Any:
    return load_parameters(directory, load_config(directory), SLOTS, dtype, **more)


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_model_is_the_one_of_its_dequantized_weights(name: str, tmp_path: Path) -> None:
    """To the bit: in float32, rounded to bfloat16, and as int8 experts."""
    quantized, plain, _ = write_quantized(tmp_path, CASES[name])
    assert same(load(quantized), load(plain))
    assert same(load(quantized, "bfloat16"), load(plain, "bfloat16"))
    assert same(load(quantized, quantization="int8"), load(plain, quantization="int8"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_code_of_fp8_is_the_number_that_torch_reads(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    got = np.empty((2, 128), np.float32)
    stored = {"weight": codes.view(getattr(ml_dtypes, dtype)), "scale": np.array([1, 2], np.float32)}
    fp8_scheme("scale", (1, 0)).dequantize(stored, got)
    expected = torch.from_numpy(codes).view(getattr(torch, dtype)).float() * torch.tensor([[1.0], [2.0]])
    np.testing.assert_array_equal(got, expected.numpy())


def test_every_scale_of_e8m0_is_the_number_that_torch_reads() -> None:
    torch = pytest.importorskip("torch")
    exponents = np.arange(255, dtype=np.uint8).reshape(255, 1)
    got = np.empty((255, 1), np.float32)
    stored = {"weight": np.ones((255, 1), ml_dtypes.float8_e4m3fn), "scale": exponents}
    fp8_scheme("scale", (1, 32)).dequantize(stored, got)
    np.testing.assert_array_equal(got, torch.from_numpy(exponents).view(torch.float8_e8m0fnu).float().numpy())


@pytest.mark.parametrize("number", range(4))
def test_blocks_are_dequantized_as_in_transformers(number: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    random = np.random.default_rng(number)
    block = tuple(int(size) for size in random.integers(1, 9, 2))
    grid = tuple(int(size) for size in random.integers(1, 90, 2))
    codes = random.normal(0, 40, (block[0] * grid[0], block[1] * grid[1])).astype(ml_dtypes.float8_e4m3fn)
    scales = random.lognormal(-5, 3, grid).astype(np.float32)
    got = np.empty(codes.shape, np.float32)
    fp8_scheme("s", (block[0], block[1])).dequantize({"weight": codes, "s": scales}, got)
    stored = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(stored, torch.from_numpy(scales))
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.safetensors")), ids=lambda file: file.stem)
def test_weights_are_those_that_compressed_tensors_reads(file: Path, tmp_path: Path) -> None:
    """Of weights that the library itself compressed (tests/golden/make_quantized.py); it rounds some to bfloat16."""
    with safe_open(file, framework="numpy") as about:
        made = about.metadata()
    shutil.copy(file, tmp_path)
    entries = {f"m.{name}": entry for name, entry in read_headers(tmp_path).entries.items()}
    [(_, expected)] = read_tensors({"expected": entries.pop("m.expected")})
    section = group(format=made["format"], **json.loads(made["weights"]))
    form = read_format({"quantization_config": section})
    assert form is not None
    problems = join_components(form, entries, {"m.weight": Tensor(("m",), expected.shape)})
    assert problems == {} and entries.keys() == {"m.weight"}
    expected = expected.copy()
    [(_, got)] = read_tensors(entries)
    np.testing.assert_array_equal(got.astype(made["dtype"]).astype(np.float32), expected)


def test_which_weights_are_quantized_the_tensors_say(tmp_path: Path) -> None:
    """Embedding, output matrix and routers too, some experts not, with any lists of left-out modules."""

    def some(name: str, weight: np.ndarray) -> bool:
        return weight.ndim == 2 and "experts.1" not in name

    config = BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.0", "re:.*gate"]}
    quantized, plain, _ = write_quantized(tmp_path, Case(config, FP8["blocks"].write), some)
    assert same(load(quantized), load(plain))


def test_groups_of_modules_have_formats_of_their_own(tmp_path: Path) -> None:
    """A name comes before a regular expression, which comes before the class of a module."""
    eight, four = FP8["rows, compressed-tensors"], PACKED["4 bits, groups"]
    groups = {
        "group_0": {**eight.config["config_groups"]["group_0"], "format": "float-quantized"},
        "group_1": {**four.config["config_groups"]["group_0"], "format": FORM, "targets": ["re:.*experts.*", "x"]},
    }

    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        return (four if "experts" in module else eight).write(module, weight, random)

    config = eight.config | {"format": "mixed-precision", "config_groups": groups}
    quantized, plain, _ = write_quantized(tmp_path, Case(config, write))
    assert same(load(quantized), load(plain))


def test_parts_of_a_weight_may_be_in_several_files(tmp_path: Path) -> None:
    quantized, plain, tensors = write_quantized(tmp_path, FP8["blocks"])
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_inv")}
    (quantized / SHARD).unlink()
    save_file(scales, quantized / "model-00001-of-00002.safetensors")
    save_file(tensors, quantized / "model-00002-of-00002.safetensors")
    assert same(load(quantized), load(plain))


def test_other_names_of_a_sparse_block_hold_for_parts(tmp_path: Path) -> None:
    """transformers 5 calls Mixtral's sparse block `mlp`."""
    changes: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 4}
    quantized, plain, stored = write_quantized(tmp_path, FP8["blocks"], lambda name, _: "experts." in name, **changes)
    save_file({name.replace("block_sparse_moe", "mlp"): value for name, value in stored.items()}, quantized / SHARD)
    assert same(load(quantized), load(plain))


def test_hf_quant_config_describes_a_checkpoint_of_modelopt(tmp_path: Path) -> None:
    quantized, plain, _ = write_quantized(tmp_path, FP8["one scale, ModelOpt"])
    (quantized / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(CheckpointError, match="not F32, F16 or BF16"):
        load(quantized)
    described: dict[str, Any] = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (quantized / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}} | described))
    assert same(load(quantized), load(plain))
    described["quantization"]["quant_algo"] = "W4A8_AWQ"
    (quantized / "hf_quant_config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"quant_algo 'W4A8_AWQ' is not supported.*hf_quant_config.json"):
        load(quantized)


def test_conversions_write_the_dequantized_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, plain, _ = write_quantized(tmp_path, FP8["blocks"])
    for script, name in ((to_orbax, "orbax"), (to_hf, "hf")):
        command = ["script", "--model", str(quantized), "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", command)
        assert script.main() == 0
        assert json.loads((tmp_path / name / "config.json").read_text()) == CONFIG
        assert same(load(tmp_path / name), load(plain))
    assert "are finite" in check.check_files(quantized)


def test_a_format_that_transformers_would_misread_is_not_compared(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    quantized, _, _ = write_quantized(tmp_path, FP8["one scale, ModelOpt"])
    with pytest.raises(CheckpointError, match=r"does not know quant_method 'modelopt'; see --reference"):
        check.reference_logits(quantized, np.zeros((1, 2), np.int32))


def changed(tensors: Tensors, name: str, value: np.ndarray | None) -> Tensors:
    rest = {key: kept for key, kept in tensors.items() if key != name}
    kept = rest if value is None else rest | {name: value}
    return {key: np.asarray(one) for key, one in kept.items()}


BAD_PARTS: dict[str, tuple[str, np.ndarray | None, str]] = {
    "no scale": ("weight_scale_inv", None, f"1 missing beside quantized weights: {GATE}.weight_scale_inv .{SHARD}"),
    "misshapen scale": (
        "weight_scale_inv",
        np.ones((2, 3), np.float32),
        rf"1 misshapen: {GATE}.weight_scale_inv .expected \[2, 2\], got \[2, 3\] in {SHARD}",
    ),
    "scale of integers": ("weight_scale_inv", np.ones((2, 2), np.int32), f"{GATE}.weight_scale_inv .I32 in {SHARD}"),
    "misshapen codes": (
        "weight",
        np.ones((16, 31), ml_dtypes.float8_e4m3fn),
        rf"1 misshapen: {GATE}.weight .expected \[16, 32\], got \[16, 31\] in {SHARD}",
    ),
    "codes of integers": ("weight", np.ones((16, 32), np.uint8), f"not F32, F16 or BF16: {GATE}.weight .U8"),
    "scale is NaN": (
        "weight_scale_inv",
        np.array([[1, 1], [np.nan, 1]], np.float32),
        f"expected finite scales in {GATE}.weight_scale_inv; got NaN or infinity in .*{SHARD}",
    ),
    "NVFP4, compressed-tensors: scale of 0": (
        "weight_global_scale",
        np.zeros(1, np.float32),
        f"expected a scale other than 0 in {GATE}.weight_global_scale; got 0 in .*{SHARD}",
    ),
    "NVFP4, ModelOpt: a scale for two": (
        "weight_scale_2",
        np.ones(2, np.float32),
        r"weight_scale_2 .expected \[\], got",
    ),
    "4 bits, groups: another shape": (
        "weight_shape",
        np.array([16, 31]),
        rf"expected the shape \[16, 32\] in {GATE}.weight_shape; got \[16, 31\] in .*{SHARD}",
    ),
    "4 bits, groups: no shape": ("weight_shape", None, f"1 missing beside quantized weights: {GATE}.weight_shape"),
    "4 bits, groups, not symmetric: no zero points": (
        "weight_zero_point",
        None,
        f"missing .*: {GATE}.weight_zero_point",
    ),
    "4 bits, columns in another order: a group too many": (
        "weight_g_idx",
        np.full(32, 4, np.int32),
        f"expected groups from 0 to 3 in {GATE}.weight_g_idx; got 4 to 4",
    ),
    "AWQ: misshapen words": ("qweight", np.ones((32, 16), np.int32), r"qweight .expected \[32, 2\], got \[32, 16\]"),
    "GPTQ: no zero points": ("qzeros", None, f"missing .*: {GATE}.qzeros"),
    "scale is infinite": ("weight_scale_inv", np.full((2, 2), np.inf, np.float32), "expected finite scales"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_bad_part_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    suffix, value, message = BAD_PARTS[name]
    case = FP8["blocks"] if suffix in ("weight", "weight_scale_inv") else PACKED[name.partition(": ")[0]]
    quantized, _, stored = write_quantized(tmp_path, case)
    save_file(changed(stored, f"{GATE}.{suffix}", value), quantized / SHARD)
    with pytest.raises(CheckpointError, match=message) as found:
        load(quantized)
    assert "\n" not in str(found.value)


def test_tensors_of_another_scheme_are_unknown(tmp_path: Path) -> None:
    """A smoothing factor of AWQ or a zero point changes the weights: it is not read over."""
    quantized, _, stored = write_quantized(tmp_path, FP8["blocks"])
    for suffix in ("pre_quant_scale", "weight_zero_point"):
        save_file(stored | {f"{GATE}.{suffix}": np.ones(32, np.float32)}, quantized / SHARD)
        with pytest.raises(CheckpointError, match=f"1 unknown: {GATE}.{suffix}"):
            load(quantized)


REFUSED: dict[str, tuple[Any, str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes"},
        "quant_method 'bitsandbytes' is not supported: expected the unq",
    ),
    "no method": ({"bits": 4}, "quant_method None is not supported.*fp8, fbgemm_fp8, compressed-tensors, modelopt"),
    "a list": ([1], "expected quantization_config to be an object"),
    "a method that is a list": ({"quant_method": ["fp8"]}, "is not supported"),
    "one size of blocks": (BLOCKS | {"weight_block_size": [128]}, "expected weight_block_size"),
    "sizes that are texts": (BLOCKS | {"weight_block_size": ["a", "b"]}, "expected weight_block_size"),
    "fp4 experts": (BLOCKS | {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    "algorithm": (modelopt("INT4_AWQ"), "quant_algo 'INT4_AWQ' is not supported: expected one of FP8, FP8_PER"),
    "format": (group("tensor", format="marlin-24"), "format 'marlin-24' of compressed-tensors is not supported"),
    "no format": (group("tensor") | {"format": None}, "format 'None' of"),
    "strategy": (group("token"), "expected the strategy tensor"),
    "group of a text": (group("group", group_size="8"), "expected the strategy tensor"),
    "strategy of a text": (group(None, group_size="8"), "has a field of the wrong type"),  # pyright: ignore
    "bits": (
        group("tensor", num_bits=6),
        "expected weights of type symmetric float and 8 bits; config.json has 6 bits",
    ),
    "3 bits packed": (
        ints("channel", FORM, 3),
        "expected weights of type int and 2, 4, 8 bits; config.json has 3 bits",
    ),
    "GPTQ of 3 bits": (GPTQ | {"bits": 3}, "expected bits among"),
    "GPTQ for Marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format gptq or gptq_v2"),
    "GPTQ with rules": (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic of quant_method gptq"),
    "GPTQ of no group": (GPTQ | {"group_size": 0}, "expected group_size as a positive number or -1"),
    "AWQ for GEMV": (AWQ | {"version": "gemv"}, "version gemm and zero_point true"),
    "no groups": (group("tensor") | {"config_groups": None}, "expected config_groups"),
    "transform": (group("tensor") | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not supp"),
    "sparsity": (group("tensor") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not su"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_format_is_refused_by_name(name: str) -> None:
    section, message = REFUSED[name]
    with pytest.raises(UnsupportedConfig, match=message) as found:
        read_config(CONFIG | {"quantization_config": section})
    assert "\n" not in str(found.value)
