"""Peak memory of importing checkpoints whose weights are quantized, over the bytes of the parameters they end in.

    python -m benchmarks.import_quantized [--layers 3] [--directory DIR]

Checkpoints of OLMoE's tensor shapes in FP8 (blocks of 128 x 128) and in 4-bit integers (pack-quantized, groups of 128),
and of gpt-oss-20b's with MXFP4 experts and a smaller vocabulary, with random codes, are each loaded in a fresh process
in bfloat16; that in MXFP4 also with experts kept in it. As in `import_memory`, peak is the largest resident set the
process ever had, and the least it can need is the parameters and the runtime (0.2 GB with JAX).
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.import_memory import TARGET, olmoe, run_task
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.fused import fused_tensor
from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.checkpoint.shards import INDEX
from moespec_jax.checkpoint.tensor_table import Tensor, tensor_table
from moespec_jax.checkpoint.write import write_config
from moespec_jax.config import DecoderConfig
from moespec_jax.files import read_json, write_json
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.quantization import Quantization
from moespec_jax.plan.abstract import with_layers

RESULTS = Path(__file__).parent / "results" / "import_quantized.json"
BF16 = np.dtype(ml_dtypes.bfloat16)
Tensors = dict[str, np.ndarray]
# Stored tensors of one matrix of this name and shape.
Write = Callable[[np.random.Generator, str, tuple[int, int]], Tensors]


def main() -> None:
    """Run everything, print one line each, and write the results beside this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        runs = list(_measure_all(Path(temporary), arguments.layers))
    result = {
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        "target_load_factor": TARGET,
        "worst_load_factor": max(run["factor"] for run in runs),
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"worst factor of a load {result['worst_load_factor']}, target {TARGET}")


def _measure_all(root: Path, layers: int) -> Iterator[dict[str, Any]]:
    shape = with_layers(read_config(MODELS["gpt-oss-20b"]), layers)
    gpt_oss = dataclasses.replace(shape, vocab_size=32768)
    kept: tuple[Quantization | None, ...] = (None, "mxfp4")
    packed = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": packed}}
    compressed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    cases: list[tuple[str, DecoderConfig, dict[str, Any], Write | None, tuple[Quantization | None, ...]]] = [
        ("FP8", olmoe(layers), {"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8, (None,)),
        ("pack-quantized, 4 bits", olmoe(layers), compressed, _packed, (None,)),
        ("MXFP4", gpt_oss, {"quant_method": "mxfp4"}, None, kept),
    ]
    for name, config, section, write, quantizations in cases:
        directory = root / "published"
        directory.mkdir()
        write_config(config, directory)
        fields = read_json(directory / "config.json")
        write_json(directory / "config.json", fields | {"quantization_config": section})
        about = {"stored": name, "stored_bytes": _write(config, directory, write)}
        for quantization in quantizations:
            parameters = abstract_decoder(config, BACKENDS["slots"], "bfloat16", quantization=quantization)
            words = ("slots", "bfloat16", directory, *([quantization] if quantization else []))
            yield run_task(about, "load", *words, size=local_bytes(parameters))
        shutil.rmtree(directory)


def _write(config: DecoderConfig, directory: Path, write: Write | None) -> int:
    """Write a checkpoint of random weights, a file for each layer; returns its bytes."""
    random, weight_map, size = np.random.default_rng(0), {}, 0
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensor_table(config).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        by_layer.setdefault(layer, {})[name] = tensor
    for layer, table in by_layer.items():
        tensors: Tensors = {}
        for name, tensor in table.items():
            matrix = len(tensor.shape) == 2 and layer != "rest" and "router" not in tensor.path
            if tensor.path[0] == "experts" and write is None:
                continue
            if matrix and write is not None:
                tensors |= write(random, name.removesuffix("weight"), (tensor.shape[0], tensor.shape[1]))
            else:
                tensors[name] = random.random(tensor.shape, np.float32).astype(BF16)
        if write is None and layer != "rest":
            tensors |= _fused_mxfp4(random, config, f"model.layers.{layer}.")
        file = f"model-{layer}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"weight_map": weight_map})
    return size


def _fp8(random: np.random.Generator, base: str, shape: tuple[int, int]) -> Tensors:
    codes = random.integers(0, 64, shape, np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = random.random((-(-shape[0] // 128), -(-shape[1] // 128)), np.float32)
    return {f"{base}weight": codes, f"{base}weight_scale_inv": scales}


def _packed(random: np.random.Generator, base: str, shape: tuple[int, int]) -> Tensors:
    words = random.integers(0, 2**31, (shape[0], shape[1] // 8)).astype(np.int32)
    scales = random.random((shape[0], shape[1] // 128), np.float32).astype(BF16)
    return {f"{base}weight_packed": words, f"{base}weight_scale": scales, f"{base}weight_shape": np.array(shape)}


def _fused_mxfp4(random: np.random.Generator, config: DecoderConfig, layer: str) -> Tensors:
    """Blocks, scales and biases of the experts of a layer."""
    tensors: Tensors = {}
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        fused, bias = fused_tensor(config, layer, name), fused_tensor(config, layer, f"{name}_bias")
        assert fused is not None and bias is not None
        experts, inner, out = fused.shape  # stored plainly, inputs are first
        blocks = random.integers(0, 256, (experts, out, inner // 32, 16), np.uint8)
        scales = random.integers(118, 126, (experts, out, inner // 32), np.uint8)
        found = {"blocks": blocks, "scales": scales, "bias": np.zeros(bias.shape, BF16)}
        tensors |= {f"{layer}mlp.{name}_{suffix}": value for suffix, value in found.items()}
    return tensors


if __name__ == "__main__":
    main()
