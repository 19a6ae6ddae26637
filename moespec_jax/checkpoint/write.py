"""Writing of parameters as a directory of safetensors that transformers and this library load.

Tensors are written one by one at their offsets, so that no shard is held in memory, into temporary files, which are
renamed when all are complete.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moespec_jax.checkpoint.dtypes import FLOAT_CODES
from moespec_jax.checkpoint.families import FAMILIES, read_config
from moespec_jax.checkpoint.fused import as_published
from moespec_jax.checkpoint.leaves import Source, cast, copy_into, with_progress
from moespec_jax.checkpoint.parameters import build_decoder, leaf_shapes, place_of
from moespec_jax.checkpoint.shards import INDEX, SINGLE_FILE
from moespec_jax.checkpoint.tensor_table import Path as TreePath
from moespec_jax.checkpoint.tensor_table import Tensor, tensor_table
from moespec_jax.config import DecoderConfig, RopeConfig
from moespec_jax.files import write_json
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.experts.layouts import Flat

MAX_SHARD_BYTES = 5_000_000_000
_CODES = {dtype: code for code, dtype in FLOAT_CODES.items()}


class Shard(NamedTuple):
    """One file to be written.

    Fields:
        dtypes: dtype of each tensor.
        ranges: first and end byte of each tensor, counted from the end of the header.
    """

    dtypes: dict[str, np.dtype]
    ranges: dict[str, tuple[int, int]]


def export(
    params: Decoder,
    config: DecoderConfig,
    directory: Path,
    dtype: DTypeLike,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """Write parameters in any back-end's layout, and their config.json, as a Hugging Face directory.

    `extra` holds further fields of config.json, such as `eos_token_id`.

    Raises:
        CheckpointError: a value does not fit `dtype`.
        ValueError: the family's config.json cannot express `config`, or the parameters are not those of `config`.
    """
    fields = checked_fields(config, {"dtype": str(jnp.dtype(dtype))} | dict(extra or {}))
    directory.mkdir(parents=True, exist_ok=True)
    source = as_published(decoder_source(params, config), config)
    write_safetensors(source, directory, dtype, max_shard_bytes, progress)
    write_json(directory / "config.json", fields)


def write_safetensors(
    source: Source,
    directory: Path,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write all tensors as one file, or as shards with an index. Without a `dtype` each tensor keeps its own.

    Raises:
        CheckpointError: the source is damaged, or a value does not fit `dtype`.
    """
    table = source.table
    dtypes = {
        name: source.dtypes[name] if dtype is None else jnp.dtype(jnp.float32 if tensor.float32 else dtype)
        for name, tensor in table.items()
    }
    shards = _plan({name: (tensor.shape, dtypes[name]) for name, tensor in table.items()}, max_shard_bytes)
    tensors = with_progress(_each(source, shards), len(table), "writing", progress)
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    temporary = [directory / f".{name}.incomplete" for name in names]
    try:
        for shard, file in zip(shards, temporary, strict=True):
            _write_shard(shard, {name: table[name].shape for name in shard.ranges}, tensors, file)
        _publish(directory, names, temporary, shards)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def write_config(config: DecoderConfig, directory: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json as the family publishes it: transformers loads it, and `read_config` returns `config`.

    Raises:
        ValueError: as `checked_fields`.
    """
    write_json(directory / "config.json", checked_fields(config, extra))


def checked_fields(config: DecoderConfig, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Compute the published fields, updated with `extra`, and check that they read back as `config`.

    Raises:
        ValueError: the family's config.json cannot express `config`; the message names the field.
    """
    fields = published_fields(config) | dict(extra or {})
    again = read_config(fields)
    for field in dataclasses.fields(config):
        requested, readable = getattr(config, field.name), getattr(again, field.name)
        if requested != readable:
            raise ValueError(
                f"expected {field.name} that {config.model_type} can express ({readable!r}); got {requested!r}"
            )
    return fields


def published_fields(config: DecoderConfig) -> dict[str, Any]:
    """Compute the published fields of a config.json. Token ids are null: defaults of some families may be outside the
    vocabulary."""
    family = FAMILIES[config.model_type]
    fields: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.model_type}
    fields |= {name: getattr(config, name) for name in _SAME}
    fields |= {"rope_theta": config.rope.rope_theta, "rope_parameters": _all_rope_fields(config)}
    fields |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return fields | family.write(config)


_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
)
# Fields of each scaling besides rope_type and rope_theta: those always written, and those written only where set.
_ROPE = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "longrope": (
        ("original_max_position_embeddings", "short_factor", "long_factor", "short_mscale", "long_mscale"),
        (),
    ),
    "yarn": (
        ("factor", "beta_fast", "beta_slow", "truncate"),
        ("original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
    ),
}


def _all_rope_fields(config: DecoderConfig) -> dict[str, Any]:
    """Published rotary settings: for each type of layer, where they have their own."""
    if config.sliding_rope is None:
        return _rope_fields(config.rope)
    return {"full_attention": _rope_fields(config.rope), "sliding_attention": _rope_fields(config.sliding_rope)}


def _rope_fields(rope: RopeConfig) -> dict[str, Any]:
    required, optional = _ROPE[rope.rope_type]
    fields = {name: getattr(rope, name) for name in ("rope_type", "rope_theta", *required)}
    if rope.partial_rotary_factor != 1.0:
        fields |= {"partial_rotary_factor": rope.partial_rotary_factor}
    return fields | {name: getattr(rope, name) for name in optional if getattr(rope, name) is not None}


def decoder_source(params: Decoder, config: DecoderConfig) -> Source:
    """Make a source of loaded parameters; each tensor is copied to the host when it is read.

    Raises:
        ValueError: the parameters are not those of `config` in the layout of a back-end.
    """
    table, backend = tensor_table(config), _backend_of(params)
    leaves = _leaves(params, config, backend, table)
    places = {name: place_of(config, backend, tensor.path) for name, tensor in table.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            leaf, row = leaves[places[name].leaf], places[name].row
            array = np.asarray(leaf if row is None else leaf[row])
            yield name, table[name].reorient(array)

    return Source({name: jnp.dtype(leaves[place.leaf].dtype) for name, place in places.items()}, read, table)


def _backend_of(params: Decoder) -> Backend:
    layout = "flat" if isinstance(params.experts, Flat) else "per_expert"
    for backend in BACKENDS.values():
        if backend.stacked == params.stacked and (backend.layout == layout or not params.experts):
            return backend
    raise ValueError(f"expected parameters in a back-end's layout; got stacked={params.stacked} with {layout} experts")


def _leaves(
    params: Decoder, config: DecoderConfig, backend: Backend, table: Mapping[str, Tensor]
) -> dict[TreePath, jax.Array]:
    """Map paths to leaves, by building a decoder whose leaves are the numbers of the paths."""
    paths = list(leaf_shapes(config, backend, table=table))
    numbers = build_decoder(config, backend, {path: i for i, path in enumerate(paths)})
    if jax.tree.structure(numbers) != jax.tree.structure(params):
        raise ValueError(f"expected the parameters of this {config.model_type}; got those of another config or layout")
    pairs = zip(jax.tree.leaves(numbers), jax.tree.leaves(params), strict=True)
    return {paths[number]: leaf for number, leaf in pairs}


def _plan(tensors: dict[str, tuple[tuple[int, ...], np.dtype]], max_shard_bytes: int) -> list[Shard]:
    """Assign tensors to shards in order; a shard ends before the tensor that would make it too large."""
    shards, size = [Shard({}, {})], 0
    for name, (shape, dtype) in tensors.items():
        count = math.prod(shape) * dtype.itemsize
        if size and size + count > max_shard_bytes:
            shards.append(Shard({}, {}))
            size = 0
        shards[-1].dtypes[name] = dtype
        shards[-1].ranges[name] = (size, size + count)
        size += count
    return shards


def _each(source: Source, shards: list[Shard]) -> Iterator[tuple[str, np.ndarray]]:
    for shard in shards:
        yield from source.read(shard.ranges)


def _write_shard(
    shard: Shard, shapes: dict[str, tuple[int, ...]], tensors: Iterator[tuple[str, np.ndarray]], file: Path
) -> None:
    """Write one shard. Its tensors are the next of the iterator, in any order."""
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": _CODES[str(shard.dtypes[name])], "shape": shapes[name], "data_offsets": span}
        for name, span in shard.ranges.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _ in shard.ranges:
            name, tensor = next(tensors)
            out.seek(8 + len(text) + shard.ranges[name][0])
            out.write(_bytes_of(cast(tensor, shard.dtypes[name], name)))


def _publish(directory: Path, names: list[str], temporary: list[Path], shards: list[Shard]) -> None:
    """Rename the temporary files. Several cannot be replaced atomically: old files are removed first and the index is
    written last, so that an interruption leaves missing tensors, never a mixture."""
    old = [file for file in (directory / INDEX, *directory.glob("model*.safetensors")) if file.exists()]
    if len(names) > 1:
        for file in old:
            file.unlink()
    for name, file in zip(names, temporary, strict=True):
        os.replace(file, directory / name)
    if len(names) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.ranges}
        total = sum(max(end for _, end in shard.ranges.values()) for shard in shards)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return
    for file in old:
        if file.name != SINGLE_FILE:
            file.unlink()


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _bytes_of(array: np.ndarray) -> memoryview:
    if not array.flags.c_contiguous:
        strided, array = array, np.empty(array.shape, array.dtype)
        copy_into(array, strided)
    return array.reshape(-1).view(np.uint8).data  # bfloat16 arrays do not support the buffer protocol
