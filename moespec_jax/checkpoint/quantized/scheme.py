"""A scheme: the tensors that make up a quantized weight, and the function that computes the weight of them.

Every scheme here stores codes, which stand for numbers, and a grid of scales, each for one rectangular tile of the
weight: a block, a group of columns, a row or the whole. Weights are `[out, in]`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
# Arrays of a weight's components, by the suffix of their names.
Components = Mapping[str, np.ndarray]
# Rows and columns of a tile; 0 stands for all of the weight's.
Tile = tuple[int, int]

WHOLE: Tile = (0, 0)
ROW: Tile = (1, 0)
_STRIP = 256


class Component(NamedTuple):
    """One stored tensor of a weight.

    Fields:
        dtypes: codes in safetensors that it may have.
        shapes: shapes that it may have.
        required: whether a weight without it is refused.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool = True


class Scheme(NamedTuple):
    """A way to store a weight.

    Fields:
        codes: suffix of the tensor of codes, in place of `weight` in the name of the weight. A weight is quantized
            where this tensor is stored in one of the dtypes of its component.
        components: function from the shape of a weight to its components, by suffix.
        dequantize: function that writes the weight into a float32 array. It raises `BadComponent`.
    """

    codes: str
    components: Callable[[Shape], dict[str, Component]]
    dequantize: Callable[[Components, np.ndarray], None]


class Format(NamedTuple):
    """The way in which a checkpoint stores its quantized weights.

    Fields:
        name: name for messages.
        schemes: function from the name of a module, such as `model.layers.0.self_attn.q_proj`, to the schemes that its
            weight may have: the first whose components are stored counts.
    """

    name: str
    schemes: Callable[[str], tuple[Scheme, ...]]


class BadComponent(ValueError):
    """A component of a weight with values that it cannot have.

    Args:
        suffix: suffix of its name.
        expected: what its values should be.
        got: what they are.
    """

    def __init__(self, suffix: str, expected: str, got: str):
        super().__init__(suffix, expected, got)
        self.suffix, self.expected, self.got = suffix, expected, got


def read_block(value: object) -> Tile | None:
    """Read a tile from a list of two sizes of a config.json; None for anything else."""
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return (value[0], value[1])
    return None


def grid_of(shape: Shape, tile: Tile) -> tuple[int, int]:
    """Compute the rows and columns of the grid of tiles; the last ones may be cut off."""
    rows, columns = (-(-size // (step or size)) for size, step in zip(shape, tile, strict=True))
    return rows, columns


def grid_shapes(shape: Shape, tile: Tile) -> tuple[Shape, ...]:
    """List the shapes in which a grid is stored: `[rows, columns]`, `[rows, 1, columns, 1]`, and `[rows]` or a scalar
    where the other sizes are 1."""
    rows, columns = grid_of(shape, tile)
    shapes: list[Shape] = [(rows, columns), (rows, 1, columns, 1)]
    shapes += [(rows,)] if columns == 1 else []
    shapes += [()] if rows == columns == 1 else []
    return tuple(shapes)


def finite_scales(components: Components, suffix: str) -> np.ndarray:
    """Convert scales to float32; bytes are exponents of e8m0.

    Raises:
        BadComponent: some are NaN or infinite.
    """
    stored = components[suffix]
    scales = (stored.view(ml_dtypes.float8_e8m0fnu) if stored.dtype == np.uint8 else stored).astype(np.float32)
    if not np.isfinite(scales).all():
        raise BadComponent(suffix, "finite scales", "NaN or infinity")
    return scales


def look_up_codes(codes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write the numbers of codes `[rows, bytes]` to `out`; `table` has for each byte the numbers of its codes. Columns
    beyond those of `out` fill the last byte. In strips of rows: an index of the whole matrix would add to peak
    memory."""
    for start in range(0, len(out), _STRIP):
        rows = out[start : start + _STRIP]
        rows[...] = table[codes[start : start + _STRIP]].reshape(len(rows), -1)[:, : out.shape[1]]


def spread(
    grid: np.ndarray, shape: Shape, tile: Tile, groups: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the values of a grid for every element of a matrix, in strips of rows. `groups` are the columns of the grid
    for each column of the matrix (default: in order)."""
    height, width = (step or size for size, step in zip(shape, tile, strict=True))
    grid = grid.reshape(grid_of(shape, tile))
    step = max(1, _STRIP // height)
    for start in range(0, len(grid), step):
        rows = slice(start * height, min((start + step) * height, shape[0]))
        part = grid[start : start + step]
        wide = np.repeat(part, width, axis=1)[:, : shape[1]] if groups is None else part[:, groups]
        yield rows, np.repeat(wide, height, axis=0)[: rows.stop - rows.start]


def multiply_tiles(out: np.ndarray, scales: np.ndarray, tile: Tile, groups: np.ndarray | None = None) -> None:
    """Multiply each tile of a matrix by its scale, in place."""
    for rows, values in spread(scales, out.shape, tile, groups):
        out[rows] *= values


def subtract_tiles(out: np.ndarray, zeros: np.ndarray, tile: Tile, groups: np.ndarray | None = None) -> None:
    """Subtract from each tile of a matrix its zero point, in place."""
    for rows, values in spread(zeros, out.shape, tile, groups):
        out[rows] -= values
