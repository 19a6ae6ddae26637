"""MXFP4 experts as gpt-oss publishes them: the matrices of all experts of a layer in one tensor of `blocks`
`[experts, out, in / 32, 16]`, two codes in a byte, and one of `scales` `[experts, out, in / 32]`."""

import re

from moespec_jax.checkpoint.fused import Fused, fused_tensor
from moespec_jax.checkpoint.quantized.fp4 import mxfp4_scheme
from moespec_jax.checkpoint.quantized.join import Problems
from moespec_jax.checkpoint.shards import Entry, Part
from moespec_jax.config import DecoderConfig

_BLOCKS = re.compile(r"((model\.layers\.[0-9]{1,4}\.)mlp\.(experts\.[a-z_]+)_)blocks")


def join_fused(config: DecoderConfig, entries: dict[str, Entry]) -> Problems:
    """Replace blocks and scales of experts by an entry for each of their matrices.

    Returns:
        Tensors that are missing or misshapen, by kind.
    """
    problems: Problems = {}
    for match in [match for name in entries if (match := _BLOCKS.fullmatch(name))]:
        fused = fused_tensor(config, match[2], match[3])
        if fused is None:
            continue
        names = (match[0], match[1] + "scales")
        if names[1] not in entries:
            missing = f"{names[1]} ({entries[names[0]].file.name})"
            problems.setdefault("missing beside quantized weights", []).append(missing)
        stored = {name: entries.pop(name) for name in names if name in entries}
        for name, shape in zip(names, _shapes(fused), strict=True):
            if name in stored and stored[name].shape != shape:
                found = f"{name} (expected {list(shape)}, got {list(stored[name].shape)} in {stored[name].file.name})"
                problems.setdefault("misshapen", []).append(found)
            if name in stored and stored[name].dtype != "U8":
                problems.setdefault("not U8", []).append(f"{name} ({stored[name].dtype} in {stored[name].file.name})")
        entries |= _entries(fused, stored, *names)
    return problems


def _block(fused: Fused) -> tuple[int, int]:
    """Shape `[out, in]` of one expert's part of a fused tensor."""
    _, part = next(iter(fused.parts.values()))
    return (fused.block[1], fused.block[0]) if part.transpose else fused.block


def _shapes(fused: Fused) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of blocks and scales."""
    out, inner = _block(fused)
    scales = (fused.shape[0], out, -(-inner // 32))
    return (*scales, 16), scales


def _entries(fused: Fused, stored: dict[str, Entry], blocks: str, scales: str) -> dict[str, Entry]:
    """Describe each matrix, as a part of what the blocks and scales of its expert stand for."""
    (out, inner), scheme, found = _block(fused), mxfp4_scheme(blocks, scales), {}
    for name, (expert, part) in fused.parts.items():
        components = {}
        for key, entry in stored.items():
            size = entry.size // fused.shape[0]
            width = size // out
            components[key] = entry._replace(shape=(out, width), start=entry.start + expert * size, size=size)
        place = (part.place[1], part.place[0]) if part.transpose else part.place
        rows, columns = (len(range(*one.indices(length))) for one, length in zip(place, (out, inner), strict=True))
        found[name] = components[blocks]._replace(
            shape=(rows, columns),
            dtype="F32",
            part=Part((out, inner), place),
            components=components,
            combine=scheme.dequantize,
        )
    return found
