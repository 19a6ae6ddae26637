"""Weights of 2 to 8 bits as published: integers and FP4, packed bit by bit with Python's integers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from published import Tensors
from quantized_writer import BF16, E4M3, E8M0, Case, group, modelopt, spread

F16 = np.float16
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each row as one long integer, the first in its lowest bits, cut into words of 32 bits."""
    rows = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), "<i4"))
    return np.stack(rows)


class Groups:
    """Unsigned codes of a weight, with scales and zero points of groups of columns, and what they stand for."""

    def __init__(self, weight: np.ndarray, bits: int, size: int, random: np.random.Generator, **how: Any):
        rows, columns = weight.shape
        size = size or columns
        grid = (rows, -(-columns // size))
        self.scales = random.uniform(0.1, 0.3, grid).astype(how.get("dtype", np.float32))
        middle = 1 << (bits - 1)
        self.zeros = np.full(grid, middle) if how.get("symmetric", True) else random.integers(1, 1 << bits, grid)
        self.groups = np.arange(columns) // size
        if how.get("shuffled"):
            self.groups = random.permutation(self.groups)
        scales, zeros = (a.astype(np.float32)[:, self.groups] for a in (self.scales, self.zeros))
        self.codes = np.clip(np.rint(weight / scales) + zeros, 0, (1 << bits) - 1).astype(np.int64)
        self.kept = ((self.codes - zeros).astype(np.float32) * scales).astype(np.float32)


def int8(size: int = 0, **how: Any) -> Any:
    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        made = Groups(weight, 8, size, random, **how)
        tensors = {f"{module}.weight": (made.codes - 128).astype(np.int8), f"{module}.weight_scale": made.scales}
        if not how.get("symmetric", True):
            tensors[f"{module}.weight_zero_point"] = (made.zeros - 128).astype(np.int8)
        return tensors, made.kept

    return write


def packed(bits: int, size: int = 0, **how: Any) -> Any:
    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        made = Groups(weight, bits, size, random, **how)
        tensors: Tensors = {
            f"{module}.weight_packed": pack(made.codes, bits),
            f"{module}.weight_scale": made.scales,
            f"{module}.weight_shape": np.array(weight.shape),
        }
        if not how.get("symmetric", True):
            tensors[f"{module}.weight_zero_point"] = pack(made.zeros.T, bits).T
        if how.get("shuffled"):
            tensors[f"{module}.weight_g_idx"] = made.groups.astype(np.int32)
        elif how.get("unset"):
            tensors[f"{module}.weight_g_idx"] = np.full(weight.shape[1], -1, np.int32)
        return tensors, made.kept

    return write


def gptq(bits: int, size: int, stored_less: int, **how: Any) -> Any:
    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        made = Groups(weight, bits, size, random, dtype=F16, **how)
        return {
            f"{module}.qweight": pack(made.codes, bits).T,
            f"{module}.qzeros": pack(made.zeros.T - stored_less, bits),
            f"{module}.scales": made.scales.T,
            f"{module}.g_idx": made.groups.astype(np.int32),
        }, made.kept

    return write


def awq(size: int) -> Any:
    """Pack eight outputs into a word: the even ones into its low half, and the odd ones into its high half."""

    def words(codes: np.ndarray) -> np.ndarray:
        return pack(codes.reshape(len(codes), -1, 4, 2).swapaxes(2, 3).reshape(codes.shape), 4)

    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        made = Groups(weight, 4, size, random, symmetric=False, dtype=F16)
        stored = {"qweight": words(made.codes.T), "qzeros": words(made.zeros.T), "scales": made.scales.T}
        return {f"{module}.{name}": value for name, value in stored.items()}, made.kept

    return write


def fp4(codes: str, scale: str, size: int, whole: str = "", divides: bool = False) -> Any:
    """MXFP4, or NVFP4 with the scale `whole` of a weight."""

    def write(module: str, weight: np.ndarray, random: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        grid = (len(weight), -(-weight.shape[1] // size))
        factor = np.float32(random.uniform(300, 900) if divides else random.uniform(1e-3, 3e-3)) if whole else None
        scales = random.uniform(0.1, 0.3, grid).astype(np.float32)
        if factor is None:
            stored = scales.astype(E8M0)
            wide = stored.astype(np.float32)
        else:
            stored = (scales * factor if divides else scales / factor).astype(E4M3)
            wide = stored.astype(np.float32) / factor if divides else stored.astype(np.float32) * factor
        factors = spread(wide, weight.shape, (1, size))
        nearest = np.abs((weight / factors)[..., None] - E2M1).argmin(-1)
        both = nearest.reshape(len(weight), -1, 2)
        tensors: Tensors = {
            f"{module}.{codes}": (both[..., 0] | both[..., 1] << 4).astype(np.uint8),
            f"{module}.{scale}": stored.view(np.uint8) if factor is None else stored,
        }
        if factor is not None:
            tensors[f"{module}.{whole}"] = factor.reshape(1 if divides else ())
        return tensors, (E2M1[nearest] * factors).astype(np.float32)

    return write


def ints(strategy: str, form: str, bits: int = 8, **more: Any) -> Mapping[str, Any]:
    return group(strategy, format=form, type="int", num_bits=bits, **more)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}
FORM, MX, NV = "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
PACKED: dict[str, Case] = {
    "int8 rows": Case(ints("channel", "int-quantized"), int8(dtype=BF16)),
    "int8 groups, not symmetric": Case(
        ints("group", "naive-quantized", group_size=8, symmetric=False), int8(8, symmetric=False)
    ),
    "4 bits, groups": Case(ints("group", FORM, 4, group_size=8), packed(4, 8, dtype=BF16)),
    "4 bits, rows": Case(ints("channel", FORM, 4), packed(4)),
    "4 bits, groups, not symmetric": Case(
        ints("group", FORM, 4, group_size=12, symmetric=False), packed(4, 12, symmetric=False)
    ),
    "4 bits, columns in another order": Case(
        ints("group", FORM, 4, group_size=8, actorder="group"), packed(4, 8, shuffled=True)
    ),
    "4 bits, order unset": Case(ints("group", FORM, 4, group_size=8, actorder=None), packed(4, 8, unset=True)),
    "8 bits, rows": Case(ints("channel", FORM, 8), packed(8)),
    "2 bits, not symmetric": Case(
        ints("group", FORM, 2, group_size=4, symmetric=False), packed(2, 4, symmetric=False)
    ),
    "MXFP4": Case(group("group", format=MX, num_bits=4, group_size=32), fp4("weight_packed", "weight_scale", 32)),
    "NVFP4, compressed-tensors": Case(
        group("tensor_group", format=NV, num_bits=4, group_size=16),
        fp4("weight_packed", "weight_scale", 16, "weight_global_scale", divides=True),
    ),
    "NVFP4, ModelOpt": Case(modelopt("NVFP4"), fp4("weight", "weight_scale", 16, "weight_scale_2")),
    "GPTQ": Case(GPTQ, gptq(4, 8, 1, shuffled=True)),
    "GPTQ, 8 bits, rows": Case(GPTQ | {"bits": 8, "group_size": -1}, gptq(8, 0, 1)),
    "GPTQ, second version": Case(
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, gptq(4, 8, 0, symmetric=False)
    ),
    "AWQ": Case(AWQ, awq(8)),
}  # fmt: skip
