"""Representation of trees of arrays in one line: their sizes in place of their values."""

import jax


def summary(self: object) -> str:
    """Format the name of a tree's class, its number of arrays, their numbers and bytes in all, and their dtypes:
    `Decoder(41 arrays of 9,178,368 numbers, 36.7 MB, float32)`."""
    # A tree may hold shapes, shardings or tracers in place of arrays.
    arrays = [leaf for leaf in jax.tree.leaves(self) if hasattr(leaf, "size") and hasattr(leaf, "dtype")]
    numbers = sum(array.size for array in arrays)
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    dtypes = ", ".join(dict.fromkeys(str(array.dtype) for array in arrays)) or "no dtype"
    count = "1 array" if len(arrays) == 1 else f"{len(arrays)} arrays"
    return f"{type(self).__name__}({count} of {numbers:,} numbers, {size / 1e6:,.1f} MB, {dtypes})"
