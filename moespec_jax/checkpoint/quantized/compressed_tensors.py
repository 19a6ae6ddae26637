"""Checkpoints of the library compressed-tensors (llm-compressor): groups of modules, each with arguments of its own."""

import re
from collections.abc import Callable

from moespec_jax.checkpoint.config_fields import Fields, section, shown
from moespec_jax.checkpoint.quantized.fp4 import mxfp4_scheme, nvfp4_scheme
from moespec_jax.checkpoint.quantized.fp8 import fp8_scheme
from moespec_jax.checkpoint.quantized.integers import PACKED_BITS, int8_scheme, packed_scheme
from moespec_jax.checkpoint.quantized.scheme import ROW, WHOLE, Format, Scheme, Tile, read_block
from moespec_jax.errors import UnsupportedConfig


def read_compressed_tensors(fields: Fields) -> Format:
    """Read a `quantization_config` of the method compressed-tensors.

    Raises:
        UnsupportedConfig: a format, or an argument of a group, is not supported; the message names it.
    """
    for name in ("transform_config", "sparsity_config"):
        extra = section(fields, name)
        if extra and extra.get("format") != "dense":
            raise UnsupportedConfig(f"{name} is not supported: expected none; config.json has {shown(extra)}")
    quantizing = [group for group in _groups(fields) if group.get("weights") is not None]
    forms = [str(group.get("format") or fields.get("format")) for group in quantizing]
    groups = [
        (_targets(group), _scheme(form, section(group, "weights")))
        for form, group in zip(forms, quantizing, strict=True)
    ]
    if len(groups) == 1:  # what its targets are, the stored tensors show
        scheme = groups[0][1]
        name = "MXFP4" if forms[0] == "mxfp4-pack-quantized" else forms[0]
        return Format(f"{name} (compressed-tensors)", lambda module: (scheme,))

    def schemes(module: str) -> tuple[Scheme, ...]:
        ranked = [(rank, scheme) for targets, scheme in groups if (rank := _match(module, targets)) is not None]
        return tuple(scheme for _, scheme in sorted(ranked, key=lambda pair: pair[0]))

    return Format("compressed-tensors", schemes)


def _groups(fields: Fields) -> list[Fields]:
    groups = section(fields, "config_groups")
    if not groups or not all(isinstance(group, dict) for group in groups.values()):
        found = shown(fields.get("config_groups"))
        raise UnsupportedConfig(f"expected config_groups to be an object of objects; config.json has {found}")
    return list(groups.values())


def _targets(group: Fields) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UnsupportedConfig(f"expected targets to be a list of names; config.json has {shown(targets)}")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise UnsupportedConfig(f"expected targets to be regular expressions; {shown(target)}: {error}") from None
    return targets


def _match(module: str, targets: list[str]) -> int | None:
    """Rank how a module is among the targets, by its name (0), a regular expression (1) or its class (2), if it is."""
    if module in targets:
        return 0
    if any(target.startswith("re:") and re.match(target[3:], module) for target in targets):
        return 1
    return 2 if "Linear" in targets else None


def _scheme(form: str, weights: Fields) -> Scheme:
    """Make the scheme of a group of a format from its arguments."""
    if form not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UnsupportedConfig(f"format {shown(form)} of compressed-tensors is not supported: expected one of {known}")
    return _FORMATS[form](weights)


def _float8(weights: Fields) -> Scheme:
    _expect(weights, "float", (8,))
    return fp8_scheme(_SCALE, _tile(weights))


def _int8(weights: Fields) -> Scheme:
    _expect(weights, "int", tuple(range(1, 9)))
    return int8_scheme(_tile(weights), weights.get("symmetric", True) is not False)


def _naive(weights: Fields) -> Scheme:
    return (_float8 if weights.get("type") == "float" else _int8)(weights)


def _packed(weights: Fields) -> Scheme:
    _expect(weights, "int", PACKED_BITS)
    return packed_scheme(weights.get("num_bits", 8), _tile(weights), weights.get("symmetric", True) is not False)


def _mxfp8(weights: Fields) -> Scheme:
    _expect(weights, "float", (8,))
    return fp8_scheme(_SCALE, (1, 32))


def _mxfp4(weights: Fields) -> Scheme:
    _expect(weights, "float", (4,))
    return mxfp4_scheme("weight_packed", _SCALE)


def _nvfp4(weights: Fields) -> Scheme:
    _expect(weights, "float", (4,))
    return nvfp4_scheme("weight_packed", _SCALE, "weight_global_scale", divides=True)


def _expect(weights: Fields, kind: str, bits: tuple[int, ...]) -> None:
    """Check the type of codes and their bits; floats are symmetric."""
    found = (weights.get("num_bits", 8), weights.get("type", "int"), weights.get("symmetric", True))
    if found[0] not in bits or found[1] != kind or (kind == "float" and found[2] is not True):
        form, sizes = "symmetric float" if kind == "float" else "int", ", ".join(map(str, bits))
        raise UnsupportedConfig(
            f"expected weights of type {form} and {sizes} bits; config.json has {shown(found[0])} bits, type"
            f" {shown(found[1])} and symmetric {shown(found[2])}"
        )


def _tile(weights: Fields) -> Tile:
    strategy, group, block = (weights.get(name) for name in ("strategy", "group_size", "block_structure"))
    if strategy is None:
        strategy = "tensor" if group is None else "group" if group > 0 else "channel"
    if strategy in _TILES:
        return _TILES[strategy]
    if strategy in ("group", "tensor_group") and type(group) is int and group > 0:
        return (1, group)
    if strategy == "block" and isinstance(block, str) and re.fullmatch("[0-9]{1,6}x[0-9]{1,6}", block):
        block = [int(size) for size in block.split("x")]
    if strategy == "block" and (tile := read_block(block)) is not None:
        return tile
    raise UnsupportedConfig(
        "expected the strategy tensor, channel, group with a group_size or block with a block_structure; config.json"
        f" has {shown(weights)}"
    )


_TILES = {"tensor": WHOLE, "channel": ROW}
_SCALE = "weight_scale"
_FORMATS: dict[str, Callable[[Fields], Scheme]] = {
    "float-quantized": _float8,
    "int-quantized": _int8,
    "naive-quantized": _naive,
    "pack-quantized": _packed,
    "mxfp8-quantized": _mxfp8,
    "mxfp4-pack-quantized": _mxfp4,
    "nvfp4-pack-quantized": _nvfp4,
}
