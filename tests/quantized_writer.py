"""Quantized checkpoints by definition: each format's stored tensors, and the weights that they stand for, both written
down element by element, in float32, without the code that is tested."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from published import Tensors
from safetensors.numpy import save_file
from tiny import CONFIG, tiny_tensors, write_json

E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16


class Case(NamedTuple):
    """One published way of storing weights: the section of config.json, and the writer of one weight.

    `write(name of the module, weight, random)` returns the stored tensors, and the float32 weight they stand for.
    """

    config: Mapping[str, Any]
    write: Callable[[str, np.ndarray, np.random.Generator], tuple[Tensors, np.ndarray]]


def spread(grid: np.ndarray, shape: tuple[int, ...], tile: tuple[int, int]) -> np.ndarray:
    """The value of a grid for every element of a matrix."""
    rows, columns = (np.arange(size) // step for size, step in zip(shape, tile, strict=True))
    return grid[np.ix_(rows, columns)]


def fp8(suffix: str, tile: tuple[int, int], stored: Callable[[np.ndarray], np.ndarray], code: Any = E4M3) -> Any:
    """A writer of FP8 weights; `stored` shapes and converts the grid of scales as the format stores them."""

    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        sizes = tuple(step or size for step, size in zip(tile, weight.shape, strict=True))
        grid = tuple(-(-size // step) for size, step in zip(weight.shape, sizes, strict=True))
        scales = stored(random.uniform(1e-3, 2e-3, grid).astype(np.float32))
        wide = (scales.view(E8M0) if scales.dtype == np.uint8 else scales).astype(np.float32).reshape(grid)
        factors = spread(wide, weight.shape, sizes)
        codes = (weight / factors).astype(np.float32).clip(-440, 440).astype(code)
        kept = codes.astype(np.float32) * factors
        return {f"{module}.weight": codes, f"{module}.{suffix}": scales}, kept

    return write


def with_static_activations(write: Any) -> Any:
    """The scales of activations and of the key/value cache beside a weight's own."""

    def both(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        tensors, kept = write(module, weight, random)
        tensors |= {f"{module}.input_scale": np.float32([0.5])}
        if module.endswith(("k_proj", "v_proj")):
            tensors |= {f"{module}.{module[-6]}_scale": np.float32(2.0).reshape(())}
        return tensors, kept

    return both


def group(strategy: str | None = None, **more: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one group."""
    form = more.pop("format", "float-quantized")
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy} | more
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    one = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    common = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return common | {"config_groups": {"group_0": one}, "ignore": ["lm_head", "re:.*mlp.gate$"]}


def same(scales: np.ndarray) -> np.ndarray:
    return scales


def modelopt(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt"},
    }


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [12, 20]}
FP8: dict[str, Case] = {
    "blocks": Case(BLOCKS | {"modules_to_not_convert": ["lm_head"]}, fp8("weight_scale_inv", (12, 20), same)),
    "blocks with bfloat16 scales": Case(BLOCKS, fp8("weight_scale_inv", (12, 20), lambda s: s.astype(BF16))),
    "blocks with ue8m0 scales": Case(
        BLOCKS | {"scale_fmt": "ue8m0"}, fp8("weight_scale_inv", (12, 20), lambda s: s.astype(E8M0))
    ),
    "e5m2": Case(BLOCKS, fp8("weight_scale_inv", (12, 20), same, ml_dtypes.float8_e5m2)),
    "one scale, transformers": Case(
        {"quant_method": "fp8", "weight_block_size": None}, fp8("weight_scale_inv", (0, 0), lambda s: s.reshape(()))
    ),
    "one scale, AutoFP8": Case(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["re:.*lm_head"]},
        with_static_activations(fp8("weight_scale", (0, 0), lambda s: s.reshape(()))),
    ),
    "rows, fbgemm": Case({"quant_method": "fbgemm_fp8"}, fp8("weight_scale", (1, 0), same)),
    "one scale, compressed-tensors": Case(group("tensor"), fp8("weight_scale", (0, 0), lambda s: s.reshape(1))),
    "rows, compressed-tensors": Case(
        group("channel"), with_static_activations(fp8("weight_scale", (1, 0), lambda s: s.astype(BF16)))
    ),
    "groups, compressed-tensors": Case(group("group", group_size=8), fp8("weight_scale", (1, 8), same)),
    "blocks, compressed-tensors": Case(
        group("block", block_structure=[16, 24]), fp8("weight_scale", (16, 24), same)
    ),
    "one scale, ModelOpt": Case(
        modelopt("FP8"), with_static_activations(fp8("weight_scale", (0, 0), lambda s: s.reshape(())))
    ),
    "rows, ModelOpt": Case(modelopt("FP8_PER_CHANNEL_PER_TOKEN"), fp8("weight_scale", (1, 0), lambda s: s[:, 0])),
    "blocks, ModelOpt": Case(modelopt("fp8_pb_wo"), fp8("weight_scale", (128, 128), lambda s: s[:, None, :, None])),
    "MXFP8, ModelOpt": Case(
        modelopt("MXFP8"), fp8("weight_scale", (1, 32), lambda s: s.astype(E8M0).view(np.uint8), E4M3)
    ),
}  # fmt: skip


class Written(NamedTuple):
    """Directories of a quantized checkpoint and of the plain one, and the stored tensors of the former."""

    quantized: Path
    plain: Path
    stored: Tensors


def is_linear(name: str, weight: np.ndarray) -> bool:
    """The weights that formats quantize: all matrices but embedding, output matrix and routers."""
    return weight.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))


def write_quantized(
    directory: Path, case: Case, quantized: Callable[[str, np.ndarray], bool] = is_linear, **changes: Any
) -> Written:
    """A tiny checkpoint in a format, and the same model in float32."""
    fields, random = CONFIG | changes, np.random.default_rng(0)
    stored, plain = {}, {}
    for name, weight in tiny_tensors(fields).items():
        if quantized(name, weight):
            parts, plain[name] = case.write(name.removesuffix(".weight"), weight, random)
            stored |= parts
        else:
            stored[name] = plain[name] = weight
    for name, tensors, more in (("quantized", stored, {"quantization_config": case.config}), ("plain", plain, {})):
        (directory / name).mkdir(parents=True)
        write_json(directory / name / "config.json", fields | more)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, directory / name / SHARD)
    return Written(directory / "quantized", directory / "plain", stored)


SHARD = "model.safetensors"
