"""Mutated checkpoints: one line that says what is wrong, or the right values; never another exception, a
hang, or memory beyond what the input declares. Heads are in test_mutated_heads.py."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import router_models
from hf_models import FAMILIES, draw_fields
from hypothesis import given
from hypothesis import strategies as st
from mutations import bounded_examples, damaged, json_files, outcome, size_of
from published import draw_tensors, write
from safetensors.numpy import load_file

from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_safetensors, open_source
from moespec_jax.checkpoint.shards import INDEX
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.files import read_json
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.layers import rope_frequencies

# What reading tensors takes whatever their size: the buffer that all go through.
BUFFER = 41 << 20
GOOD = {family: draw_fields(family, 4) for family in FAMILIES}
GOOD |= {family: router_models.draw_fields(family, 4) for family in ("glm4_moe",)}
FIELDS = GOOD["qwen3_moe"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole checkpoint of every family; what each test mutates it puts back."""
    root = tmp_path_factory.mktemp("families")
    directories = {family: write(root / family, fields, draw_tensors(fields)) for family, fields in GOOD.items()}
    for directory in directories.values():  # what is imported and compiled once is no input's memory
        load_parameters(directory, load_config(directory), BACKENDS["switch"], "float32")
    return directories


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sharded"), FIELDS, draw_tensors(FIELDS), shards=2, index=True)


def tensors_of(directory: Path, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, in memory of its own."""
    return {name: array.copy() for name, array in open_source(directory, config).read(tensor_table(config))}


def usable(config: DecoderConfig) -> DecoderConfig:
    """The same settings, once everything that is later made of their numbers could be made."""
    assert 0 < config.context_length < 2**70
    if config.head_dim < 4096:
        frequencies, scale = rope_frequencies(config.rope, config.head_dim, config.max_position_embeddings)
        assert frequencies.shape == (config.head_dim // 2,) and math.isfinite(scale)
    assert len(config.sliding_windows) == len(config.sparse_layers) == config.num_hidden_layers
    return config


@pytest.mark.parametrize("family", GOOD)
def test_config(family: str, checkpoints: dict[str, Path]) -> None:
    """A config.json that passes is of a checkpoint whose tensors are loaded, or refused as not its own."""
    directory, good = checkpoints[family], GOOD[family]
    original = tensors_of(directory, load_config(directory))
    stated = {name: value for name, value in good.items() if name != "rope_parameters"}

    @bounded_examples(60)
    @given(json_files(stated | {"layer_types": None, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}))
    def check(data: bytes) -> None:
        (directory / "config.json").write_bytes(data)
        config = outcome(lambda: usable(load_config(directory)), len(data))
        if config is None:
            return
        declared = size_of(directory)
        found = outcome(lambda: tensors_of(directory, config), declared, BUFFER)
        for name, array in (found or {}).items():
            assert np.array_equal(array, original[name])
        if found:
            assert outcome(lambda: load_parameters(directory, config, BACKENDS["switch"], "float32"), declared, BUFFER)

    try:
        check()
    finally:
        (directory / "config.json").write_text(json.dumps(good))


@st.composite
def shards(draw: st.DrawFn, good: bytes) -> bytes:
    """A safetensors file with another header, another length of it, or damaged bytes."""
    (size,) = struct.unpack("<Q", good[:8])
    header, body = good[8 : 8 + size], good[8 + size :]
    kind = draw(st.sampled_from(["header"] * 4 + ["length", "bytes", "body", "offsets"]))
    if kind == "bytes":
        return draw(damaged(good[: 8 + size])) + body
    if kind == "body":
        return good[: 8 + size] + draw(damaged(body))
    if kind == "length":
        length = draw(st.sampled_from([0, 1, size - 1, size + 1, 2 * size, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", length) + header + body
    if kind == "offsets":
        fields = json.loads(header)
        name = draw(st.sampled_from(sorted(fields.keys() - {"__metadata__"})))
        places = fields[name]["data_offsets"]
        places[draw(st.integers(0, 1))] = draw(st.sampled_from([0, -1, 4, places[1] + 4, 2**63, 2**64 - 4, 1.5, None]))
        header = json.dumps(fields).encode()
    else:
        header = draw(json_files(json.loads(header)))
    return struct.pack("<Q", len(header)) + header + body


def test_safetensors_header(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["olmoe"]
    file, config = directory / "model.safetensors", load_config(directory)
    good = file.read_bytes()

    @bounded_examples(160)
    @given(shards(good))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        found = outcome(lambda: tensors_of(directory, config), len(data), BUFFER)
        if found is not None:
            independent = load_file(file)
            assert found.keys() <= independent.keys()
            assert all(np.array_equal(found[name], independent[name], equal_nan=True) for name in found)

    try:
        check()
    finally:
        file.write_bytes(good)


@st.composite
def indexes(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """An index with other values, or one whose files lie elsewhere."""
    outside = [
        "../secret.safetensors",
        "/etc/passwd",
        "/secret.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "\x00",
    ]
    outside += [
        "./model-00001-of-00002.safetensors",
        "z" * 400 + ".safetensors",
        "\ud800.safetensors",
        "~/x.safetensors",
    ]
    if draw(st.booleans()):
        return draw(json_files(good))
    names = draw(st.lists(st.sampled_from(sorted(good["weight_map"])), min_size=1, max_size=5))
    changed = good["weight_map"] | {name: draw(st.sampled_from(outside)) for name in names}
    return json.dumps(good | {"weight_map": changed}).encode()


def test_shard_index(sharded: Path) -> None:
    """A file outside the directory is as good as any other, and never read."""
    config, original = load_config(sharded), tensors_of(sharded, load_config(sharded))
    good = read_json(sharded / INDEX)
    (sharded.parent / "secret.safetensors").write_bytes((sharded / "model-00001-of-00002.safetensors").read_bytes())

    @bounded_examples(80)
    @given(indexes(good))
    def check(data: bytes) -> None:
        (sharded / INDEX).write_bytes(data)
        found = outcome(lambda: tensors_of(sharded, config), size_of(sharded), BUFFER)
        if found is not None:
            assert all(Path(name).parent == Path() for name in json.loads(data)["weight_map"].values())
            assert all(np.array_equal(found[name], original[name]) for name in original)

    check()


def test_orbax_manifest(tmp_path: Path) -> None:
    write(tmp_path, FIELDS, draw_tensors(FIELDS))
    config = load_config(tmp_path)
    original = tensors_of(tmp_path, config)
    write_orbax(open_safetensors(tmp_path, config), config, tmp_path)
    manifest = tmp_path / "orbax" / "manifest.json"
    good = read_json(manifest)
    assert tensors_of(tmp_path, config).keys() == original.keys()

    @bounded_examples(60)
    @given(json_files(good))
    def check(data: bytes) -> None:
        manifest.write_bytes(data)
        found = outcome(lambda: tensors_of(tmp_path, config), size_of(tmp_path), BUFFER)
        assert found is None or all(np.array_equal(found[name], original[name]) for name in original)

    check()


@pytest.fixture(autouse=True, scope="module")
def _run_once() -> Iterator[None]:
    """Whatever the first use of a device takes is no input's memory."""
    jax.block_until_ready(jax.device_put(np.zeros(1, np.float32)))
    yield
