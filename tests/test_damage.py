"""What is damaged is not loaded, and the message says what is wrong with it and where, in one line."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_models import draw_fields
from published import draw_tensors, write
from safetensors.numpy import save_file

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.read import load_config, load_parameters, read_json
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS

SWITCH = BACKENDS["switch"]
# Damage: what is done to a directory of two shards with an index, and what the message must say.
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def _header(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    """Edits the header of the shard that holds the last norm."""

    def damage(directory: Path) -> None:
        file = directory / read_json(directory / INDEX)["weight_map"][NORM]
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        edit(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def _index(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = read_json(directory / INDEX)
        edit(index)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def _only(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        for file in (INDEX, ONE, TWO):
            (directory / file).unlink()
        (directory / name).write_bytes(b"weights")

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: os.truncate(d / TWO, 500), f"expected a whole safetensors file at .*{TWO}"),
    "empty": (lambda d: os.truncate(d / TWO, 0), "expected a whole safetensors file"),
    "garbage": (lambda d: (d / ONE).write_bytes(b"\x07" * 999), "expected a whole safetensors file"),
    "endless header": (lambda d: (d / ONE).write_bytes(b"\xff" * 8), "expected a whole safetensors file"),
    "absurd shape": (_header(lambda h: h[NORM].update(shape=[2**62, 2**62])), "expected a whole safetensors file"),
    "absurd offsets": (_header(lambda h: h[NORM].update(data_offsets=[0, 2**62])), "expected a whole safetensors"),
    "unknown dtype": (_header(lambda h: h[NORM].update(dtype="F99")), "expected a whole safetensors file"),
    "renamed": (
        _header(lambda h: h.update(extra=h.pop(NORM))),
        f"^expected the tensors of olmoe; got 1 unknown: extra; 1 missing: {NORM} in ",
    ),
    "other shape": (
        _header(lambda h: h[NORM].update(shape=[4, h[NORM]["shape"][0] // 4])),
        rf"1 misshapen: {NORM} \(expected \[\d+\], got \[4, \d+\]\) in ",
    ),
    "missing shard": (lambda d: (d / TWO).unlink(), f"expected {TWO} in .*; there is no such shard"),
    "shard of which the cache has no blob": (
        lambda d: ((d / TWO).unlink(), (d / TWO).symlink_to("../../blobs/0123.incomplete")),
        f"expected {TWO} in .*; there is no such shard",
    ),
    "shard of another model": (
        lambda d: save_file({"transformer.wte.weight": np.ones((4, 4), np.float32)}, d / TWO),
        r"got 1 unknown: transformer.wte.weight; \d+ missing: ",
    ),
    "shard is a directory": (lambda d: ((d / TWO).unlink(), (d / TWO).mkdir()), "it is no file"),
    "index names a parent": (
        _index(lambda i: i["weight_map"].update({NORM: "../x.safetensors"})),
        r"expected \*.safetensors beside .*; it names ../x.safetensors",
    ),
    "index names the root": (_index(lambda i: i["weight_map"].update({NORM: "/x.safetensors"})), "it names /x.safe"),
    "index names another kind": (_index(lambda i: i["weight_map"].update({NORM: "..."})), "it names ..."),
    "index of numbers": (_index(lambda i: i["weight_map"].update({NORM: 3})), "expected an object 'weight_map'"),
    "index without a map": (_index(lambda i: i.pop("weight_map")), "expected an object 'weight_map'"),
    "index without a shard": (
        _index(lambda i: i.update(weight_map={n: f for n, f in i["weight_map"].items() if f == ONE})),
        r"^expected the tensors of olmoe; got \d+ missing: .* and \d+ more in ",
    ),
    "index is no JSON": (lambda d: (d / INDEX).write_text("{"), "expected JSON in "),
    "pickle": (_only("pytorch_model.bin"), r"expected \*.safetensors or .* another format \(pytorch_model.bin\)"),
    "GGUF": (_only("model.Q4_K.gguf"), r"expected \*.safetensors or .* another format \(model.Q4_K.gguf\)"),
    "nothing": (_only("README.md"), r"expected \*.safetensors or an orbax directory in .*; there is neither"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_in_one_line(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 0)
    directory = write(tmp_path, fields, draw_tensors(fields), shards=2, index=True)
    config = load_config(directory)
    load_parameters(directory, config, SWITCH, "float32")
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_parameters(directory, config, SWITCH, "float32")
    assert "\n" not in str(raised.value) and str(directory) in str(raised.value)


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.uint16, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: type, tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 0)
    tensors = draw_tensors(fields)
    tensors[NORM] = tensors[NORM].astype(dtype)
    with pytest.raises(CheckpointError, match=rf"got 1 not F32, F16 or BF16: {NORM} \((I8|F64|U16|F8_E4M3)\) in "):
        load_parameters(write(tmp_path, fields, tensors), read_config(fields), SWITCH, "float32")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 0)
    tensors = draw_tensors(fields)
    embed = "model.embed_tokens.weight"
    tensors |= {"surplus": np.ones(1, np.float32), embed: tensors[embed].T, NORM: tensors[NORM].astype(np.int8)}
    router = "model.layers.0.mlp.gate.weight"
    del tensors[router]
    directory = write(tmp_path, fields, tensors, shards=2)
    twice = "model.layers.1.mlp.gate.weight"
    save_file({twice: tensors[twice]}, directory / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load_parameters(directory, read_config(fields), SWITCH, "float32")
    for part in (
        "1 unknown: surplus;",
        f"1 missing: {router};",
        f"1 misshapen: {embed} (expected ",
        f"1 doubly assigned: {twice} (in model-0000",
        f"1 not F32, F16 or BF16: {NORM} (I8) in {tmp_path}",
    ):
        assert part in str(raised.value)


def test_names_from_a_file_cannot_break_the_line(tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 0)
    tensors = draw_tensors(fields) | {"a\nerror: b\x1b[31m": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError) as raised:
        load_parameters(write(tmp_path, fields, tensors), read_config(fields), SWITCH, "float32")
    assert str(raised.value).isprintable()


def test_random_damage_loads_or_is_refused(tmp_path: Path) -> None:
    """Whatever bytes of the header are overwritten, nothing but CheckpointError comes out."""
    fields = draw_fields("olmoe", 0) | {"num_hidden_layers": 1}
    file = write(tmp_path, fields, draw_tensors(fields)) / "model.safetensors"
    config, good, rng = read_config(fields), file.read_bytes(), random.Random(5)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(header)] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            load_parameters(tmp_path, config, SWITCH, "float32")
        except CheckpointError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a file config.json in .*; there is none"),
        ("{", "expected JSON in .*config.json; "),
        ("[]", "expected a JSON object in .*config.json; it holds a list"),
        ('{"model_type": "gpt2"}', "expected a model_type among .*config.json"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "expected JSON in .*config.json; "),
        ("[" * 100_000, "expected JSON in .*config.json; "),
    ],
)
def test_unreadable_config_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"num_hidden_layers": 3}, r"expected the tensors of olmoe; got \d+ missing: model.layers.2."),
        ("olmoe", {"vocab_size": 77}, r"2 misshapen: model.embed_tokens.weight \(expected \[77, "),
        ("mixtral", {}, r"expected the tensors of mixtral; got \d+ unknown: .* \d+ missing: "),
    ],
)
def test_the_weights_of_another_model_are_refused(family: str, changes: dict, message: str, tmp_path: Path) -> None:
    """A config.json beside weights that are not its own."""
    fields = draw_fields("olmoe", 0) | {"num_hidden_layers": 2, "tie_word_embeddings": False}
    write(tmp_path, fields, draw_tensors(fields))
    own = fields if family == "olmoe" else draw_fields(family, 0)
    (tmp_path / "config.json").write_text(json.dumps(own | changes))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_parameters(tmp_path, load_config(tmp_path), SWITCH, "float32")
    assert "\n" not in str(raised.value)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(CheckpointError, match="expected a directory with a config.json; .*model is a file"):
        load_config(tmp_path / "model")
    fields = draw_fields("olmoe", 0)
    with pytest.raises(CheckpointError, match="expected a directory of safetensors or orbax; .*model is none"):
        load_parameters(tmp_path / "model", read_config(fields), SWITCH, "float32")
