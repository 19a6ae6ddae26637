"""GPTQ and AWQ: unsigned codes packed into int32 words, with a zero point and a scale for each group of inputs.

Tensors are stored transposed, inputs before outputs. GPTQ packs inputs, AWQ outputs and in an order of its own.
"""

import numpy as np

from moespec_jax.checkpoint.config_fields import Fields, shown
from moespec_jax.checkpoint.quantized.integers import PACKED_BITS, SCALES, column_groups, unsigned_codes, words
from moespec_jax.checkpoint.quantized.scheme import (
    Component,
    Components,
    Format,
    Scheme,
    Shape,
    Tile,
    finite_scales,
    grid_of,
    look_up_codes,
    multiply_tiles,
    subtract_tiles,
)
from moespec_jax.errors import UnsupportedConfig

_CODES, _ZEROS, _SCALES, _GROUPS = "qweight", "qzeros", "scales", "g_idx"
# Place in an AWQ word of each of its eight outputs.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def read_gptq(fields: Fields) -> Format:
    """Read a `quantization_config` of the method gptq.

    Raises:
        UnsupportedConfig: a field has a value that is not supported.
    """
    bits, form = fields.get("bits"), fields.get("checkpoint_format", "gptq")
    if bits not in PACKED_BITS or form not in ("gptq", "gptq_v2"):
        raise UnsupportedConfig(
            f"expected bits among {PACKED_BITS} and checkpoint_format gptq or gptq_v2; config.json has"
            f" {shown(bits)} and {shown(form)}"
        )
    if rules := [rule for rule in fields.get("dynamic") or {} if not rule.startswith("-:")]:
        raise UnsupportedConfig(f"dynamic of quant_method gptq is not supported: expected none; it has {shown(rules)}")
    # The first version stores zero points less 1.
    scheme = gptq_scheme(bits, _tile(fields), offset=1 if form == "gptq" else 0)
    return Format("GPTQ", lambda module: (scheme,))


def read_awq(fields: Fields) -> Format:
    """Read a `quantization_config` of the method awq.

    Raises:
        UnsupportedConfig: a field has a value that is not supported.
    """
    found = (fields.get("bits", fields.get("w_bit", 4)), fields.get("version", "gemm"), fields.get("zero_point", True))
    if found[0] != 4 or str(found[1]).lower() != "gemm" or found[2] is not True:
        raise UnsupportedConfig(
            "expected bits 4, version gemm and zero_point true of quant_method awq; config.json has"
            f" {', '.join(map(shown, found))}"
        )
    scheme = awq_scheme(_tile(fields))
    return Format("AWQ", lambda module: (scheme,))


def gptq_scheme(bits: int, tile: Tile, offset: int) -> Scheme:
    """Make GPTQ's scheme; `offset` is what zero points are stored less."""

    def components(shape: Shape) -> dict[str, Component]:
        rows, groups = grid_of(shape, tile)
        return {
            _CODES: Component(("I32",), ((words(shape[1], bits), rows),)),
            _ZEROS: Component(("I32",), ((groups, words(rows, bits)),)),
            _SCALES: Component(SCALES, ((groups, rows),)),
            _GROUPS: Component(("I32", "I64"), ((shape[1],),), required=False),
        }

    def dequantize(stored: Components, out: np.ndarray) -> None:
        rows, count = grid_of(out.shape, tile)
        look_up_codes(np.ascontiguousarray(stored[_CODES].T).view(np.uint8), unsigned_codes(bits), out)
        zeros = np.empty((count, rows), np.float32)
        look_up_codes(stored[_ZEROS].view(np.uint8), unsigned_codes(bits), zeros)
        zeros += np.float32(offset)
        groups = column_groups(stored, _GROUPS, count)
        subtract_tiles(out, np.ascontiguousarray(zeros.T), tile, groups)
        multiply_tiles(out, np.ascontiguousarray(finite_scales(stored, _SCALES).T), tile, groups)

    return Scheme(_CODES, components, dequantize)


def awq_scheme(tile: Tile) -> Scheme:
    """Make AWQ's scheme of 4-bit codes."""

    def components(shape: Shape) -> dict[str, Component]:
        rows, groups = grid_of(shape, tile)
        return {
            _CODES: Component(("I32",), ((shape[1], words(rows, 4)),)),
            _ZEROS: Component(("I32",), ((groups, words(rows, 4)),)),
            _SCALES: Component(SCALES, ((groups, rows),)),
        }

    def dequantize(stored: Components, out: np.ndarray) -> None:
        _unpack_awq(stored[_CODES], out)
        zeros = np.empty(grid_of(out.shape, tile), np.float32)
        _unpack_awq(stored[_ZEROS], zeros)
        subtract_tiles(out, zeros, tile)
        multiply_tiles(out, np.ascontiguousarray(finite_scales(stored, _SCALES).T), tile)

    return Scheme(_CODES, components, dequantize)


def _unpack_awq(packed: np.ndarray, out: np.ndarray) -> None:
    """Unpack words `[inputs, outputs / 8]` to codes `[outputs, inputs]`."""
    by_output = np.ascontiguousarray(packed.T)
    for i, place in enumerate(_AWQ_PLACES):
        rows = out[i::8]
        rows[...] = (by_output >> 4 * place & 15)[: len(rows)]


def _tile(fields: Fields) -> Tile:
    """Read the size of groups; -1 stands for all inputs."""
    size = fields.get("group_size", fields.get("q_group_size", -1))
    if type(size) is not int or (size < 1 and size != -1):
        raise UnsupportedConfig(f"expected group_size as a positive number or -1; config.json has {shown(size)}")
    return (1, max(size, 0))
