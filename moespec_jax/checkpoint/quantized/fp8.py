"""FP8 weights: codes of e4m3 or e5m2, with a scale for each block, each row or the whole weight.

Of `quantization_config`, `quant_method` fp8 (DeepSeek, Qwen, MiniMax, GLM, AutoFP8) and fbgemm_fp8 are read here.
"""

import functools

import ml_dtypes
import numpy as np

from moespec_jax.checkpoint.config_fields import Fields, shown
from moespec_jax.checkpoint.quantized.scheme import (
    ROW,
    WHOLE,
    Component,
    Components,
    Format,
    Scheme,
    Shape,
    Tile,
    finite_scales,
    grid_shapes,
    look_up_codes,
    multiply_tiles,
    read_block,
)
from moespec_jax.errors import UnsupportedConfig

CODES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
# Of transformers.
_DEFAULT_BLOCK = [128, 128]


def fp8_scheme(scale: str, *tiles: Tile) -> Scheme:
    """Make the scheme of FP8 codes in `weight` and scales in the suffix `scale`, for tiles of one of these sizes."""

    def components(shape: Shape) -> dict[str, Component]:
        stored = tuple(one for tile in tiles for one in grid_shapes(shape, tile))
        return {"weight": Component(tuple(CODES), (shape,)), scale: Component(SCALES, stored)}

    def dequantize(stored: Components, out: np.ndarray) -> None:
        scales = finite_scales(stored, scale)
        tile = next(one for one in tiles if scales.shape in grid_shapes(out.shape, one))
        codes = stored["weight"]
        look_up_codes(codes.view(np.uint8), _table(codes.dtype), out)
        multiply_tiles(out, scales, tile)

    return Scheme("weight", components, dequantize)


def read_fp8(section: Fields) -> Format:
    """Read a `quantization_config` of the method fp8.

    Raises:
        UnsupportedConfig: a field has a value that is not supported.
    """
    block = section.get("weight_block_size", _DEFAULT_BLOCK)
    tile = read_block(block)
    if block is not None and tile is None:
        raise UnsupportedConfig(f"expected weight_block_size as two sizes or null; config.json has {shown(block)}")
    if section.get("expert_dtype", "fp8") != "fp8":
        found = shown(section["expert_dtype"])
        raise UnsupportedConfig(f"expert_dtype {found} of quant_method fp8 is not supported: expected fp8")
    blocks: tuple[Tile, ...] = (WHOLE, ROW) if tile is None else (tile,)
    # Where no size of blocks is stated, DeepSeek's spelling has the default one, and AutoFP8's has none.
    other = blocks if "weight_block_size" in section else (WHOLE, ROW)
    schemes = (fp8_scheme("weight_scale_inv", *blocks), fp8_scheme("weight_scale", *other))
    return Format("FP8", lambda module: schemes)


def read_fbgemm(section: Fields) -> Format:
    """Read a `quantization_config` of the method fbgemm_fp8: a scale for each row."""
    schemes = (fp8_scheme("weight_scale", ROW),)
    return Format("FP8 (fbgemm_fp8)", lambda module: schemes)


@functools.cache
def _table(dtype: np.dtype) -> np.ndarray:
    """Number of each code of an 8-bit dtype `[256, 1]`."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)[:, None]
