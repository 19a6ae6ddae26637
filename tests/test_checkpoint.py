"""What is loaded is what was published, bit for bit, however it is cut into files."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flat_experts import flat_from_per_expert
from hf_models import FAMILIES, Fields, draw_fields
from published import DTYPES, Tensors, draw_tensors, same, write
from tiny import write_tiny

from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.decoder import Decoder
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.runtime.load import load

SWITCH, SLOTS = BACKENDS["switch"], BACKENDS["slots"]


def published(params: Decoder, fields: Fields) -> Tensors:
    """The tensors of unstacked parameters under their published names, spelled out without the tensor table."""
    mixtral = fields["model_type"] == "mixtral"
    block = "block_sparse_moe" if mixtral else "mlp"
    names = dict(gate="w1", up="w3", down="w2") if mixtral else dict(gate="gate_proj", up="up_proj", down="down_proj")
    found = {
        "model.embed_tokens.weight": params.embed,
        "model.norm.weight": params.norm,
        "lm_head.weight": params.lm_head,
    }
    experts = iter(params.experts)  # pyright: ignore[reportArgumentType]
    for i, layer in enumerate(params.layers):
        at = f"model.layers.{i}."
        found[f"{at}input_layernorm.weight"] = layer.input_norm
        found[f"{at}post_attention_layernorm.weight"] = layer.post_attention_norm
        for name in "qkvo":
            weight = getattr(layer.attention, name)
            found[f"{at}self_attn.{name}_proj.weight"] = weight.T if name == "o" else weight
            found[f"{at}self_attn.{name}_proj.bias"] = getattr(layer.attention, f"{name}_bias")
        found[f"{at}self_attn.q_norm.weight"] = layer.attention.q_norm
        found[f"{at}self_attn.k_norm.weight"] = layer.attention.k_norm
        mlps = {f"{at}mlp.": layer.mlp} if hasattr(layer.mlp, "gate") else {}
        if not mlps:
            found[f"{at}{block}.gate.weight"] = layer.mlp.router
            found[f"{at}mlp.shared_expert_gate.weight"] = layer.mlp.shared_gate
            mlps = {f"{at}{block}.experts.{e}.": mlp for e, mlp in enumerate(next(experts))}
            mlps |= {f"{at}mlp.shared_expert.": layer.mlp.shared} if layer.mlp.shared else {}
        for prefix, mlp in mlps.items():
            for name, theirs in names.items() if "experts" in prefix else dict(names, **_DENSE).items():
                found[f"{prefix}{theirs}.weight"] = getattr(mlp, name).T
    return {name: np.asarray(value) for name, value in found.items() if value is not None}


_DENSE = dict(gate="gate_proj", up="up_proj", down="down_proj")


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lands_where_its_name_says(family: str, number: int, tmp_path: Path) -> None:
    fields = draw_fields(family, number)
    tensors = draw_tensors(fields)
    directory = write(tmp_path, fields, tensors)
    got = published(load_parameters(directory, load_config(directory), SWITCH, "float32"), fields)
    assert got.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_back_ends_hold_equal_parameters(family: str, number: int, tmp_path: Path) -> None:
    fields = draw_fields(family, number)
    directory = write(tmp_path, fields, draw_tensors(fields))
    config = load_config(directory)
    plain, stacked = (load_parameters(directory, config, backend, "float32") for backend in (SWITCH, SLOTS))
    layers = [jax.tree.map(lambda a, i=i: a[i], run) for run in stacked.layers for i in range(run.input_norm.shape[0])]
    for one, other in zip(plain.layers, layers, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    if config.num_sparse_layers:
        assert isinstance(stacked.experts, Flat)
        expected = flat_from_per_expert(plain.experts)  # pyright: ignore[reportArgumentType]
        jax.tree.map(np.testing.assert_array_equal, stacked.experts, expected)


@pytest.mark.parametrize("backend", ["switch", "slots"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_conversion_rounds_to_nearest(stored: str, dtype: str, backend: str, tmp_path: Path) -> None:
    fields = draw_fields("qwen3_moe", 0)
    tensors = draw_tensors(fields, stored)
    config = read_config(fields)
    params = load_parameters(write(tmp_path / "a", fields, tensors), config, BACKENDS[backend], dtype)
    converted = {name: value.astype(DTYPES[dtype]) for name, value in tensors.items()}
    expected = load_parameters(write(tmp_path / "b", fields, converted), config, BACKENDS[backend], dtype)
    assert same(params, expected)


@pytest.mark.parametrize(("shards", "index"), [(1, True), (3, False), (3, True)])
def test_how_it_is_cut_into_files_changes_nothing(shards: int, index: bool, tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 1)
    tensors, config = draw_tensors(fields), read_config(fields)
    whole = load_parameters(write(tmp_path / "whole", fields, tensors), config, SLOTS, "float32")
    cut = write(tmp_path / "cut", fields, tensors, shards, index)
    assert same(load_parameters(cut, config, SLOTS, "float32"), whole)


def test_files_outside_the_index_are_not_read(tmp_path: Path) -> None:
    """Mistral's repositories hold the same weights a second time, under other names."""
    fields = draw_fields("mixtral", 0)
    directory = write(tmp_path, fields, draw_tensors(fields), shards=2, index=True)
    (directory / "consolidated.safetensors").write_bytes(b"whatever")
    load_parameters(directory, read_config(fields), SWITCH, "float32")


@pytest.mark.parametrize("backend", ["switch", "slots"])
def test_values_that_are_no_numbers_stay_what_they_are(backend: str, tmp_path: Path) -> None:
    fields = draw_fields("mixtral", 0)
    tensors = draw_tensors(fields)
    for name in ("model.norm.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"):
        tensors[name].reshape(-1)[:3] = np.nan, np.inf, -np.inf
    params = load_parameters(write(tmp_path, fields, tensors), read_config(fields), BACKENDS[backend], "bfloat16")
    np.testing.assert_array_equal(np.asarray(params.norm)[:3].astype(np.float32), [np.nan, np.inf, -np.inf])
    gate = params.experts[0][0].gate.T if backend == "switch" else params.experts.gate[0].T  # pyright: ignore
    np.testing.assert_array_equal(np.asarray(gate).reshape(-1)[:3].astype(np.float32), [np.nan, np.inf, -np.inf])


def test_tensors_that_hold_nothing_new_are_ignored(tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 0) | {"tie_word_embeddings": True}
    tensors = draw_tensors(fields)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    params = load_parameters(write(tmp_path, fields, tensors), read_config(fields), SWITCH, "float32")
    assert params.lm_head is None


@pytest.mark.slow
def test_placement_decides_where_leaves_live(tmp_path: Path) -> None:
    """Experts split over four devices by row, everything else on all of them: same values, asked shardings."""
    fields = draw_fields("qwen3_moe", 0) | {"num_experts": 4, "mlp_only_layers": [], "decoder_sparse_step": 1}
    write(tmp_path, fields, draw_tensors(fields))
    script = f"""
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pathlib import Path
from moespec_jax.parallel.mesh import EXPERT, MeshConfig, ShardingPlan, make_mesh
from moespec_jax.checkpoint.placement import Placement
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.checkpoint.read import load_config, load_parameters
directory = Path({str(tmp_path)!r})
mesh = make_mesh(MeshConfig(expert=4))
place = Placement(mesh, ShardingPlan(experts=4))
spread, everywhere = NamedSharding(mesh, P(EXPERT)), NamedSharding(mesh, P())
for dtype in ("float32", "bfloat16"):
    load = lambda *args: load_parameters(directory, load_config(directory), BACKENDS["slots"], dtype, *args)
    plain, placed = load(), load(place)
    assert placed.experts.gate.sharding.is_equivalent_to(spread, 3), placed.experts.gate.sharding
    assert placed.embed.sharding.is_equivalent_to(everywhere, 2)
    # Each device has a shard of every layer's experts, layer after layer.
    layers = len(plain.experts.gate) // 4
    order = np.arange(4 * layers).reshape(layers, 4).T.reshape(-1)
    for name in ("gate", "up", "down"):
        assert np.array_equal(getattr(placed.experts, name), getattr(plain.experts, name)[order])
    rest = lambda params: jax.tree.leaves((params.layers, params.embed, params.norm, params.lm_head))
    assert all(np.array_equal(a, b) for a, b in zip(rest(plain), rest(placed), strict=True))
"""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run = subprocess.run([sys.executable, "-c", script], env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("beside", [True, False], ids=["beside a model", "alone"])
def test_an_adapter_is_refused_by_name(tmp_path: Path, beside: bool) -> None:
    """Its base model alone would be another model."""
    if beside:
        write_tiny(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    for read in (load_config, lambda directory: load(str(directory))):
        with pytest.raises(
            CheckpointError, match=r"without an adapter; .*adapter_config.json is a PEFT .* merge"
        ) as found:
            read(tmp_path)
        assert "\n" not in str(found.value) and str(tmp_path) in str(found.value)
    (tmp_path / "adapter_config.json").unlink()
    assert not beside or load(str(tmp_path)).config == load_config(tmp_path)
