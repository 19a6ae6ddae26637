"""FP4 weights: two codes of e2m1 in a byte, the first in its low half, with a scale for each group of columns.

MXFP4 has a power of two for 32 columns (gpt-oss, compressed-tensors). NVFP4 has an e4m3 scale for 16 columns, and a
float32 scale for the whole weight, by which ModelOpt multiplies and compressed-tensors divides.
"""

import ml_dtypes
import numpy as np

from moespec_jax.checkpoint.config_fields import Fields
from moespec_jax.checkpoint.quantized.scheme import (
    BadComponent,
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
)

_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# Numbers of the two codes of each byte.
E2M1_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
_MX, _NV = (1, 32), (1, 16)


def read_mxfp4(fields: Fields) -> Format:
    """Read a `quantization_config` of the method mxfp4: that of fused experts, which their names identify."""
    return Format("MXFP4", lambda module: ())


def mxfp4_scheme(codes: str, scale: str) -> Scheme:
    """Make the scheme of e2m1 codes with e8m0 scales, in tensors of these suffixes."""

    def dequantize(stored: Components, out: np.ndarray) -> None:
        _dequantize(stored[codes], finite_scales(stored, scale), _MX, out)

    def components(shape: Shape) -> dict[str, Component]:
        return {codes: _codes(shape), scale: Component(("U8", "F8_E8M0"), grid_shapes(shape, _MX))}

    return Scheme(codes, components, dequantize)


def nvfp4_scheme(codes: str, scale: str, whole: str, divides: bool) -> Scheme:
    """Make the scheme of e2m1 codes with e4m3 scales and one scale of the whole, which multiplies or divides."""

    def dequantize(stored: Components, out: np.ndarray) -> None:
        factor, scales = finite_scales(stored, whole).reshape(()), finite_scales(stored, scale)
        if factor == 0:
            raise BadComponent(whole, "a scale other than 0", "0")
        _dequantize(stored[codes], scales / factor if divides else scales * factor, _NV, out)

    def components(shape: Shape) -> dict[str, Component]:
        return {
            codes: _codes(shape),
            scale: Component(("F8_E4M3",), grid_shapes(shape, _NV)),
            whole: Component(("F32",), ((), (1,))),
        }

    return Scheme(codes, components, dequantize)


def _codes(shape: Shape) -> Component:
    return Component(("U8",), ((shape[0], -(-shape[1] // 2)),))


def _dequantize(codes: np.ndarray, scales: np.ndarray, tile: Tile, out: np.ndarray) -> None:
    look_up_codes(codes, E2M1_PAIRS, out)
    multiply_tiles(out, scales, tile)
