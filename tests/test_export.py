"""What is exported loads as what it was, here and in transformers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hf_models import FAMILIES, draw_fields, hf_logits
from published import DTYPES, draw_tensors, same, write
from safetensors import safe_open

from convert.check import our_logits
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import random_decoder
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.checkpoint.write import export, published_fields, write_config
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS

INDEX = "model.safetensors.index.json"


@pytest.mark.slow_except("mixtral-slots", "qwen3_moe-switch")
@pytest.mark.parametrize("backend", ["switch", "slots"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_parameters_come_back(family: str, backend: str, tmp_path: Path) -> None:
    fields = draw_fields(family, 4)
    config = read_config(fields)
    write(tmp_path / "published", fields, draw_tensors(fields))
    for dtype in DTYPES:
        params = load_parameters(tmp_path / "published", config, BACKENDS[backend], dtype)
        export(params, config, tmp_path / dtype, dtype)
        assert load_config(tmp_path / dtype) == config
        assert same(load_parameters(tmp_path / dtype, config, BACKENDS[backend], dtype), params)


@pytest.mark.slow
def test_random_parameters_come_back(keys, tmp_path: Path) -> None:
    config = read_config(draw_fields("qwen3_moe", 2) | {"tie_word_embeddings": True})
    params = random_decoder(config, BACKENDS["slots"], next(keys), "bfloat16")
    export(params, config, tmp_path, "bfloat16", extra={"eos_token_id": 5})
    assert same(load_parameters(tmp_path, config, BACKENDS["slots"], "bfloat16"), params)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["dtype"], fields["eos_token_id"], fields["tie_word_embeddings"]) == ("bfloat16", 5, True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 5_000, 30_000])
def test_shards_keep_to_their_size(limit: int, keys, tmp_path: Path) -> None:
    config = read_config(draw_fields("qwen2_moe", 0))
    params = random_decoder(config, BACKENDS["switch"], next(keys), "float32")
    export(params, config, tmp_path, "float32", max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    total = 0
    for file in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(file, "numpy") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]
            assert sum(sizes) <= limit or len(sizes) == 1
            assert all(index["weight_map"].pop(name) == file.name for name in shard.keys())
            assert shard.metadata() == {"format": "pt"}
            total += sum(sizes)
    assert index["weight_map"] == {} and index["metadata"]["total_size"] == total
    assert same(load_parameters(tmp_path, config, BACKENDS["switch"], "float32"), params)


def test_an_export_replaces_an_earlier_one(keys, tmp_path: Path) -> None:
    """From one file to many and back: nothing of the earlier files stays, or the loader would mix them."""
    config = read_config(draw_fields("olmoe", 0))
    for limit in (10**9, 5_000, 30_000, 10**9):
        params = random_decoder(config, BACKENDS["switch"], next(keys), "float32")
        export(params, config, tmp_path, "float32", max_shard_bytes=limit)
        assert same(load_parameters(tmp_path, config, BACKENDS["switch"], "float32"), params)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_failed_export_leaves_the_earlier_one(keys, tmp_path: Path) -> None:
    config = read_config(draw_fields("olmoe", 0))
    params = random_decoder(config, BACKENDS["switch"], next(keys), "float32")
    export(params, config, tmp_path, "float32")
    before = {file.name for file in tmp_path.iterdir()}
    large = dataclasses.replace(params, norm=params.norm.at[0].set(1e6))  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match=r"expected values that fit float16; model.norm.weight \(float32\)"):
        export(large, config, tmp_path, "float16", max_shard_bytes=5_000)
    assert {file.name for file in tmp_path.iterdir()} == before
    assert same(load_parameters(tmp_path, config, BACKENDS["switch"], "float32"), params)


def test_parameters_of_another_config_are_refused(keys, tmp_path: Path) -> None:
    config = read_config(draw_fields("olmoe", 0))
    params = random_decoder(config, BACKENDS["switch"], next(keys), "float32")
    other = dataclasses.replace(config, num_experts=config.num_experts + 1)
    with pytest.raises(ValueError, match="expected the parameters of this olmoe"):
        export(params, other, tmp_path, "float32")
    assert not list(tmp_path.glob("*safetensors*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_config_survives_its_file(family: str) -> None:
    """All rotary scalings, windows, dense layers and flags that `draw_fields` draws."""
    for number in range(60):
        config = read_config(draw_fields(family, number))
        fields = json.loads(json.dumps(published_fields(config)))
        assert read_config(fields) == config
        assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == config.rope.rope_theta


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", {"norm_topk_prob": False}),
        ("mixtral", {"clip_qkv": 1.0}),
        ("olmoe", {"moe_intermediate_size": 7}),
        ("olmoe", {"sparse_layers": (True, False)}),
        ("qwen3_moe", {"qk_norm": "flat"}),
        ("qwen3_moe", {"sliding_windows": (3, 5)}),
        ("qwen2_moe", {"o_bias": True}),
    ],
)
def test_what_a_family_cannot_say_is_refused(family: str, change: dict, tmp_path: Path) -> None:
    config = dataclasses.replace(read_config(draw_fields(family, 0)), **change)
    with pytest.raises(ValueError, match=f"expected {next(iter(change))} that {family} can express"):
        write_config(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize(("number", "family"), list(enumerate(FAMILIES, start=1)))
def test_transformers_computes_the_same_with_it(number: int, family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = draw_fields(family, number)  # numbers 1 to 4: all rotary scalings
    config = read_config(fields)
    write(tmp_path / "published", fields, draw_tensors(fields))
    params = load_parameters(tmp_path / "published", config, BACKENDS["slots"], "float32")
    export(params, config, tmp_path, "float32", 20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(theirs).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    ids = np.random.default_rng(number).integers(0, config.vocab_size, (2, 12), np.int32)
    ours = our_logits(tmp_path, config, ids)
    np.testing.assert_allclose(ours, hf_logits(theirs.eval(), ids), rtol=1e-4, atol=1e-4 * float(np.max(np.abs(ours))))


@pytest.mark.torch
def test_the_written_config_is_the_one_transformers_would_write(tmp_path: Path) -> None:
    """Read by transformers and written again, it still describes the same decoder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for family in FAMILIES:
        for number in range(10):
            config = read_config(draw_fields(family, number))
            write_config(config, tmp_path)
            theirs = transformers.AutoConfig.from_pretrained(tmp_path)
            again = read_config(json.loads(theirs.to_json_string(use_diff=False)))
            assert dataclasses.replace(again, rope=config.rope) == config
            assert again.rope.rope_type == config.rope.rope_type and again.rope.factor == config.rope.factor
