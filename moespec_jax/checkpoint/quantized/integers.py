"""Integer weights: codes of 2, 4 or 8 bits with scales and, where they are not symmetric, zero points for each tile.

A weight is `(code - zero point) * scale`. compressed-tensors stores int8 codes (`int-quantized`), or packs them into
int32 words, from the low bits to the high (`pack-quantized`); packed codes and zero points are unsigned.
"""

import functools

import numpy as np

from moespec_jax.checkpoint.quantized.scheme import (
    BadComponent,
    Component,
    Components,
    Scheme,
    Shape,
    Tile,
    finite_scales,
    grid_of,
    grid_shapes,
    look_up_codes,
    multiply_tiles,
    subtract_tiles,
)

PACKED_BITS = (2, 4, 8)
SCALES = ("F32", "BF16", "F16")
_SCALE, _ZERO, _GROUPS, _SHAPE = "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"


def int8_scheme(tile: Tile, symmetric: bool) -> Scheme:
    """Make the scheme of int8 codes in `weight`."""

    def components(shape: Shape) -> dict[str, Component]:
        grid = grid_shapes(shape, tile)
        return {
            "weight": Component(("I8",), (shape,)),
            _SCALE: Component(SCALES, grid),
            _ZERO: Component(("I8", "I32", *SCALES), grid, required=not symmetric),
        }

    def dequantize(stored: Components, out: np.ndarray) -> None:
        out[...] = stored["weight"]
        if _ZERO in stored:
            subtract_tiles(out, stored[_ZERO].astype(np.float32), tile)
        multiply_tiles(out, finite_scales(stored, _SCALE), tile)

    return Scheme("weight", components, dequantize)


def packed_scheme(bits: int, tile: Tile, symmetric: bool) -> Scheme:
    """Make the scheme of codes packed along rows in `weight_packed`; zero points are packed along columns, or int8."""

    def components(shape: Shape) -> dict[str, Component]:
        rows, groups = grid_of(shape, tile)
        found = {
            "weight_packed": Component(("I32",), ((shape[0], words(shape[1], bits)),)),
            _SCALE: Component(SCALES, grid_shapes(shape, tile)),
            _SHAPE: Component(("I64", "I32"), ((2,),)),
            _GROUPS: Component(("I32", "I64"), ((shape[1],),), required=False),
        }
        if not symmetric:
            found[_ZERO] = Component(("I32", "I8"), ((words(rows, bits), groups), *grid_shapes(shape, tile)))
        return found

    def dequantize(stored: Components, out: np.ndarray) -> None:
        if stored[_SHAPE].tolist() != list(out.shape):
            raise BadComponent(_SHAPE, f"the shape {list(out.shape)}", str(stored[_SHAPE].tolist()))
        look_up_codes(stored["weight_packed"].view(np.uint8), unsigned_codes(bits), out)
        groups = column_groups(stored, _GROUPS, grid_of(out.shape, tile)[1])
        middle = np.float32(1 << (bits - 1))
        if symmetric:
            out -= middle
        else:
            zeros = stored[_ZERO]
            wide = zeros + middle if zeros.dtype == np.int8 else _unpack_columns(zeros, bits, grid_of(out.shape, tile))
            subtract_tiles(out, wide.astype(np.float32), tile, groups)
        multiply_tiles(out, finite_scales(stored, _SCALE), tile, groups)

    return Scheme("weight_packed", components, dequantize)


def words(codes: int, bits: int) -> int:
    """Count the int32 words of a row of codes."""
    return -(-codes * bits // 32)


@functools.cache
def unsigned_codes(bits: int) -> np.ndarray:
    """Codes that each byte holds, from its low bits to its high ones, as float32 `[256, codes]`."""
    shifts = np.arange(0, 8, bits)
    return (np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)).astype(np.float32)


def column_groups(stored: Components, suffix: str, groups: int) -> np.ndarray | None:
    """Read the group of each column, where they are stored: columns may be quantized in another order than they have.
    Values of -1 stand for none.

    Raises:
        BadComponent: a group does not exist.
    """
    found = stored.get(suffix)
    if found is None or (found == -1).all():
        return None
    if found.min() < 0 or found.max() >= groups:
        raise BadComponent(suffix, f"groups from 0 to {groups - 1}", f"{found.min()} to {found.max()}")
    return found


def _unpack_columns(packed: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """Unpack a matrix of this shape whose columns are packed."""
    out = np.empty(shape[::-1], np.float32)
    look_up_codes(np.ascontiguousarray(packed.T).view(np.uint8), unsigned_codes(bits), out)
    return out.T
