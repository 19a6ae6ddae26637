"""Checkpoints of the library compressed-tensors (llm-compressor): groups of modules, each with arguments of its own."""

import re
from collections.abc import Callable

from moespec_jax.checkpoint.config_fields import Fields, section, shown
from moespec_jax.checkpoint.quantized.fp8 import fp8_scheme
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
    groups = [
        (_targets(group), _scheme(str(group.get("format") or fields.get("format")), section(group, "weights")))
        for group in _groups(fields)
        if group.get("weights") is not None
    ]
    if len(groups) == 1:  # what its targets are, the stored tensors show
        scheme = groups[0][1]
        return Format("compressed-tensors", lambda module: (scheme,))

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


def _float(weights: Fields) -> Scheme:
    kind = (weights.get("type"), weights.get("num_bits", 8))
    if kind != ("float", 8) or not weights.get("symmetric", True):
        raise UnsupportedConfig(f"expected weights as symmetric 8-bit floats; config.json has {shown(weights)}")
    return fp8_scheme("weight_scale", _tile(weights))


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
_FORMATS: dict[str, Callable[[Fields], Scheme]] = {"float-quantized": _float, "naive-quantized": _float}
