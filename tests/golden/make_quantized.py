"""Makes `quantized/`: weights that compressed-tensors compresses, and what it reads back from them.

    python tests/golden/make_quantized.py; needs torch and compressed-tensors

A file for each format has the stored tensors of one weight, the weight as the library decompresses it (`expected`), and
in the metadata the arguments of its `quantization_config`.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

HERE = Path(__file__).parent / "quantized"
ROWS, COLUMNS = 24, 64
FORMATS = {
    "float8_rows": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "float8_blocks": ("float-quantized", dict(num_bits=8, type="float", strategy="block", block_structure=[8, 16])),
    "int8_rows": ("int-quantized", dict(num_bits=8, type="int", strategy="channel")),
    "int8_groups_asymmetric": (
        "naive-quantized",
        dict(num_bits=8, type="int", strategy="group", group_size=16, symmetric=False),
    ),
    "int4_groups": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=32)),
    "int4_groups_asymmetric": (
        "pack-quantized",
        dict(num_bits=4, type="int", strategy="group", group_size=8, symmetric=False),
    ),
    "int2_rows_asymmetric": ("pack-quantized", dict(num_bits=2, type="int", strategy="channel", symmetric=False)),
    "int8_packed_rows": ("pack-quantized", dict(num_bits=8, type="int", strategy="channel")),
    "mxfp4": ("mxfp4-pack-quantized", dict(num_bits=4, type="float", strategy="group", group_size=32)),
    "mxfp8": ("mxfp8-quantized", dict(num_bits=8, type="float", strategy="group", group_size=32)),
    "nvfp4": ("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16)),
}


def make(name: str, form: str, weights: dict) -> None:
    """Compress a random weight; write what is stored and what it stands for."""
    torch.manual_seed(len(name))
    weight = torch.randn(ROWS, COLUMNS)
    tile = weights.get("block_structure") or [1, weights.get("group_size", COLUMNS)]
    grid = (ROWS // tile[0], COLUMNS // tile[1])
    state = {"weight": weight, "weight_scale": torch.rand(grid) * 0.05 + 0.2}
    if form.startswith("mx"):
        weights |= {"scale_dtype": "torch.uint8"}
        state["weight_scale"] = 2.0 ** torch.randint(-4, 2, grid)
    if form.startswith("nvfp4"):
        state |= {"weight_global_scale": torch.tensor([700.0]), "weight_scale": torch.rand(grid) * 200 + 100}
    if not weights.get("symmetric", True):
        low = -(1 << (weights["num_bits"] - 1))
        state["weight_zero_point"] = torch.randint(low, -low, grid).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    tensors = {**stored, "expected": expected.float()}
    metadata = {"format": form, "weights": json.dumps(weights), "dtype": str(expected.dtype).removeprefix("torch.")}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors", metadata)
    print(name, {key: (value.dtype, list(value.shape)) for key, value in tensors.items()})


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, (form, weights) in FORMATS.items():
        make(name, form, weights)
