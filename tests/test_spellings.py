"""A checkpoint that is written otherwise (fused, renamed, tied, beside leftovers) loads as the same model, or is
refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_models import FAMILIES, Fields, draw_fields, hf_logits
from published import DTYPES, Tensors, draw_tensors, same, write
from safetensors.numpy import load_file, save_file

from convert.check import our_logits
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.read import load_parameters
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.decoder import Decoder

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(directory: Path, fields: Fields, backend: str = "slots", dtype: str = "float32") -> Decoder:
    return load_parameters(directory, read_config(fields), BACKENDS[backend], dtype)


def fused(fields: Fields, tensors: Tensors) -> Tensors:
    """The form that transformers 5 writes with `save_original_format=False`."""
    gate, up, down = ("w1", "w3", "w2") if fields["model_type"] == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = {name.replace("block_sparse_moe", "mlp"): value for name, value in tensors.items()}
    experts = range(read_config(fields).num_experts)
    for at in sorted({name.split("experts.")[0] + "experts." for name in found if ".experts." in name}):
        matrices = [[found.pop(f"{at}{e}.{name}.weight") for name in (gate, up, down)] for e in experts]
        found[f"{at}gate_up_proj"] = np.stack([np.concatenate([g, u]) for g, u, _ in matrices])
        found[f"{at}down_proj"] = np.stack([d for _, _, d in matrices])
    return found


@pytest.mark.slow_except("qwen2_moe-float32", "mixtral-bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts_are_the_split_ones(family: str, dtype: str, tmp_path: Path) -> None:
    fields = draw_fields(family, 2)
    tensors = draw_tensors(fields, dtype)
    split = load(write(tmp_path / "split", fields, tensors), fields, dtype=dtype)
    together = fused(fields, tensors)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in together)
    for shards in (1, 3):
        directory = write(tmp_path / f"fused-{shards}", fields, together, shards, index=shards > 1)
        assert same(load(directory, fields, dtype=dtype), split)


def test_one_layer_may_be_fused_and_another_split(tmp_path: Path) -> None:
    fields = draw_fields("mixtral", 0)
    tensors = draw_tensors(fields)
    mixed = {name: value for name, value in tensors.items() if ".layers.0." in name or ".layers." not in name}
    mixed |= {name: value for name, value in fused(fields, tensors).items() if ".layers.1." in name}
    whole = load(write(tmp_path / "whole", fields, tensors), fields, "switch")
    assert same(load(write(tmp_path / "mixed", fields, mixed), fields, "switch"), whole)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_fused_experts_that_do_not_fit_are_refused(family: str, tmp_path: Path) -> None:
    fields = draw_fields(family, 0)
    tensors = draw_tensors(fields)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    other = fused(fields, tensors)
    other[name] = np.ascontiguousarray(other[name].swapaxes(1, 2))  # as Qwen3-VL-MoE
    with pytest.raises(CheckpointError, match=rf"misshapen: {name} \(expected \["):
        load(write(tmp_path / "turned", fields, other), fields)
    twice = tensors | {name: fused(fields, tensors)[name]}
    with pytest.raises(CheckpointError, match=r"doubly assigned: .*\(also as "):
        load(write(tmp_path / "twice", fields, twice), fields)


@pytest.mark.torch
@pytest.mark.slow_except("mixtral", "qwen3_moe")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_from_memory(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = draw_fields(family, 1) | {"tie_word_embeddings": False}
    write(tmp_path, fields, draw_tensors(fields))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "fused" / WHOLE))
    ids = np.random.default_rng(0).integers(0, fields["vocab_size"], (1, 6), np.int32)
    ours = our_logits(tmp_path / "fused", read_config(fields), ids)
    np.testing.assert_allclose(ours, hf_logits(model, ids), rtol=1e-4, atol=1e-4 * float(np.max(np.abs(ours))))


def test_a_whole_file_counts_before_the_index_of_other_shards(tmp_path: Path) -> None:
    """transformers leaves the index of earlier shards beside a new file, and does not read it."""
    fields = draw_fields("olmoe", 1)
    tensors = draw_tensors(fields)
    whole = load(write(tmp_path / "whole", fields, tensors), fields)
    gone, older = tmp_path / "gone", tmp_path / "older"
    write(gone, fields, tensors, shards=2, index=True)
    for file in gone.glob("model-*"):
        file.unlink()
    write(older, fields, {name: value + 1 for name, value in tensors.items()}, shards=2, index=True)
    for directory in (gone, older):
        save_file(tensors, directory / WHOLE)
        assert same(load(directory, fields), whole)


def test_a_whole_file_that_the_index_names_is_a_shard(tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 1)
    tensors = draw_tensors(fields)
    whole = load(write(tmp_path / "whole", fields, tensors), fields)
    cut = write(tmp_path / "cut", fields, tensors, shards=2, index=True)
    names = {"model-00001-of-00002.safetensors": WHOLE}
    (cut / "model-00001-of-00002.safetensors").rename(cut / WHOLE)
    weight_map = {
        key: names.get(file, file) for key, file in json.loads((cut / INDEX).read_text())["weight_map"].items()
    }
    (cut / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert same(load(cut, fields), whole)


def test_tensors_that_the_index_does_not_name_are_read(tmp_path: Path) -> None:
    """Transformers reads whole files too."""
    fields = draw_fields("qwen3_moe", 0)
    tensors = draw_tensors(fields)
    whole = load(write(tmp_path / "whole", fields, tensors), fields)
    cut = write(tmp_path / "cut", fields, tensors, shards=2, index=True)
    index = json.loads((cut / INDEX).read_text())
    for name in [EMBEDDING, "model.norm.weight"]:
        del index["weight_map"][name]
    (cut / INDEX).write_text(json.dumps(index))
    assert same(load(cut, fields), whole)


TIED = draw_fields("qwen2_moe", 0) | {"tie_word_embeddings": True}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_copy_of_a_tied_embedding_is_redundant(shards: int, tmp_path: Path) -> None:
    tensors = draw_tensors(TIED)
    whole = load(write(tmp_path / "tied", TIED, tensors), TIED)
    copied = tensors | {LM_HEAD: tensors[EMBEDDING].copy()}
    assert whole.lm_head is None
    assert same(load(write(tmp_path / "copied", TIED, copied, shards, index=True), TIED), whole)
    # What safetensors' save_model writes of tied tensors: one, and not always the embedding.
    output = {LM_HEAD if name == EMBEDDING else name: value for name, value in tensors.items()}
    assert same(load(write(tmp_path / "output", TIED, output, shards, index=True), TIED), whole)


@pytest.mark.parametrize("change", ["values", "last value", "rows", "dtype"])
def test_another_output_matrix_beside_tied_embeddings_is_refused(change: str, tmp_path: Path) -> None:
    """transformers would use it, whatever config.json says."""
    tensors = draw_tensors(TIED)
    other = tensors[EMBEDDING].copy()
    if change == "last value":
        other[-1, -1] += 1
    other = {"values": other * 2, "rows": other[1:], "dtype": other.astype(np.float16)}.get(change, other)
    directory = write(tmp_path, TIED, tensors | {LM_HEAD: other})
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true; they differ") as caught:
        load(directory, TIED)
    assert str(directory) in str(caught.value)
