"""Heads go out in the formats other engines read and come back bit for bit, or are refused by name."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from draft_heads import (
    HEAD,
    HEADS,
    KV_HEADS,
    MODEL,
    VOCAB,
    Fields,
    head_tensors,
    renamed,
    same_tree,
    specforge_fields,
    speculators_fields,
    target,
    write_head,
)
from safetensors.numpy import load_file

from moespec_jax.checkpoint.head.read import LoadedDraft, load_draft, share_embedding
from moespec_jax.checkpoint.head.write import ExportFormat, export_draft
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json

NORMS = {"midlayer.self_attn.q_norm.weight": (HEAD,), "midlayer.self_attn.k_norm.weight": (HEAD,)}
QUERY, KEY = (HEADS * HEAD,), (KV_HEADS * HEAD,)
BIASES = {f"midlayer.self_attn.{n}_proj.bias": shape for n, shape in {"q": QUERY, "k": KEY, "v": KEY}.items()}
EMBEDDING = {"embed_tokens.weight": (VOCAB, MODEL)}
EMBED = np.random.default_rng(1).normal(size=(VOCAB, MODEL)).astype(np.float32)


def load(directory: Path, dtype: Any = np.float32, **options: Any) -> LoadedDraft:
    return load_draft(directory, target(), dtype, **options)


def export(loaded: LoadedDraft, directory: Path, format: ExportFormat, **options: Any) -> Path:
    export_draft(loaded.head, loaded.config, directory, format, target=target(), **options)
    return directory


# What a head is made of; and the format it is published in.
VARIANTS: dict[str, tuple[Fields, dict[str, Any], str]] = {
    "plain": (specforge_fields(), {}, "specforge"),
    "bfloat16": (specforge_fields(), {"dtype": ml_dtypes.bfloat16}, "specforge"),
    "full vocabulary": (specforge_fields(draft_vocab_size=VOCAB), {"full": True}, "specforge"),
    "fc norms": (
        specforge_fields(fc_norm=True),
        {"extra": {f"fc_norm.{i}.weight": (16,) for i in range(3)}},
        "specforge",
    ),
    "fc bias": (specforge_fields(), {"extra": {"fc.bias": (MODEL,)}}, "specforge"),
    "own embedding": (specforge_fields(), {"extra": EMBEDDING}, "specforge"),
    "rope": (specforge_fields(rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0}), {}, "specforge"),
    "llama3": (
        specforge_fields(rope_scaling={"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}),
        *({}, "specforge"),
    ),
    "residual": (speculators_fields(), {"extra": EMBEDDING}, "speculators"),
    "one fc norm": (speculators_fields(), {"extra": EMBEDDING | {"input_norm.weight": (48,)}}, "speculators"),
    "output normed": (speculators_fields(norm_output=True), {"extra": EMBEDDING}, "speculators"),
    "Qwen3": (speculators_fields(layer={"model_type": "qwen3"}), {"extra": EMBEDDING | NORMS}, "speculators"),
    "biases": (
        speculators_fields(layer={"attention_bias": True}),
        {"extra": EMBEDDING | BIASES | {"midlayer.self_attn.o_proj.bias": (MODEL,)}},
        "speculators",
    ),
    "two layers": (
        speculators_fields(layer={"num_hidden_layers": 2}),
        {"extra": EMBEDDING, "layers": 2},
        "speculators",
    ),
    "embedding tapped": (speculators_fields((0, 4, 8)), {"extra": EMBEDDING}, "speculators"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_head_goes_out_and_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    fields, options, format = VARIANTS[variant]
    tensors = head_tensors(**options)
    first = load(write_head(tmp_path / "in", fields, renamed(tensors)), None)
    again = load(export(first, tmp_path / "out", format), None)  # pyright: ignore[reportArgumentType]
    assert again.config == first.config and again.format == format and same_tree(again.head, first.head)
    published = load_file(tmp_path / "out" / "model.safetensors")
    expected = tensors if format == "specforge" else renamed(tensors)
    assert published.keys() - {"d2t", "t2d"} == expected.keys() - {"d2t", "t2d"}
    assert all(published[n].tobytes() == expected[n].tobytes() for n in expected)


@pytest.mark.parametrize("variant", ["plain", "bfloat16", "full vocabulary", "fc norms", "rope"])
def test_there_and_back_between_the_formats(variant: str, tmp_path: Path) -> None:
    fields, options, _ = VARIANTS[variant]
    first = load(write_head(tmp_path / "in", fields, head_tensors(**options)), None)
    embedding = EMBED.astype(first.head.fc.dtype)
    export(first, tmp_path / "vllm", "speculators", target_embedding=embedding, target_name="some/target")
    through = load(tmp_path / "vllm", None)
    assert through.config == dataclasses.replace(first.config, own_embedding=True)
    assert np.asarray(through.head.embed).tobytes() == embedding.tobytes()
    # That it is the target's is seen only beside the target's.
    shared = share_embedding(through, jnp.asarray(embedding))
    assert shared.config == first.config and same_tree(shared.head, first.head)
    assert share_embedding(through, jnp.asarray(embedding) * 2) is through
    back = load(export(shared, tmp_path / "back", "specforge"), None)
    assert back.config == first.config and same_tree(back.head, first.head)


def test_what_engines_read_is_written(tmp_path: Path) -> None:
    first = load(write_head(tmp_path / "in", specforge_fields((1, 3, 5), rope_theta=1e6), head_tensors()))
    ours = read_json(export(first, tmp_path / "a", "specforge") / "config.json")
    assert ours["architectures"] == ["LlamaForCausalLMEagle3"] and ours["tie_word_embeddings"] is False
    assert ours["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    assert ours["rope_theta"] == ours["rope_parameters"]["rope_theta"] == 1e6 and "target_hidden_size" not in ours
    export(first, tmp_path / "b", "speculators", target_embedding=EMBED, target_name="some/target")
    ours = read_json(tmp_path / "b" / "config.json")
    assert ours["speculators_model_type"] == "eagle3" and ours["norm_before_residual"] is False
    assert ours["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert ours["transformer_layer_config"]["head_dim"] == HEAD
    verifier = ours["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "some/target", "architectures": ["Qwen3MoeForCausalLM"]}
    full = load(write_head(tmp_path / "full", specforge_fields(draft_vocab_size=VOCAB), head_tensors(full=True)))
    export(full, tmp_path / "c", "speculators", target_embedding=EMBED)
    assert "d2t" not in load_file(tmp_path / "c" / "model.safetensors")
    assert not load_file(export(full, tmp_path / "d", "specforge") / "model.safetensors")["d2t"].any()


def test_biases_without_one_on_the_output_get_a_zero_for_vllm(tmp_path: Path) -> None:
    tensors = head_tensors(extra=EMBEDDING | BIASES)
    first = load(write_head(tmp_path / "in", speculators_fields(), renamed(tensors)))
    assert first.head.layers[0].attention.o_bias is None
    again = load(export(first, tmp_path / "out", "speculators")).head.layers[0].attention.o_bias
    assert again is not None and not np.asarray(again).any()


@pytest.mark.parametrize("format", ["specforge", "speculators"])
def test_an_export_replaces_a_checkpoint_whole_or_not_at_all(
    format: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(write_head(tmp_path / "in", specforge_fields(), head_tensors()))
    directory = export(first, tmp_path / "out", "specforge")
    (directory / "model.safetensors.index.json").write_text("{}")
    options = {"target_embedding": EMBED}
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(
            "moespec_jax.checkpoint.head.files.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
        )
        export(first, directory, format, **options)
    (directory / "model.safetensors.index.json").unlink()
    assert same_tree(load(directory).head, first.head)
    export(first, directory, format, **options)
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert load(directory).format == format


INEXPRESSIBLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "residual": ({"norm_before_residual": True}, "specforge", "norm_before_residual"),
    "norm before": ({"norm_before_fc": True}, "specforge", "norm_before_fc"),
    "norm output": ({"norm_output": True}, "specforge", "norm_output"),
    "query norm": ({"qk_norm": "head"}, "specforge", "qk_norm head"),
    "flat norm": ({"qk_norm": "flat"}, "speculators", "qk_norm flat"),
    "bias": ({"attention_bias": True}, "specforge", "attention_bias"),
    "fc bias": ({"fc_bias": True}, "speculators", "fc_bias"),
    "layers": ({"num_hidden_layers": 2}, "specforge", "num_hidden_layers 2"),
    "embedding": ({"boundaries": (0, 4, 6)}, "specforge", "boundary 0"),
    "four": ({"boundaries": (1, 2, 3, 4)}, "speculators", "4 boundaries"),
    "other target": ({"boundaries": (2, 4, 60)}, "specforge", "boundaries from 0 to 8"),
    "other head": ({"hidden_size": 32}, "specforge", r"fc.weight kept as \[48, 32\]; the head has one of \[48, 16\]"),
    "no embedding": ({}, "speculators", r"the target's embedding \[40, 16\] .*; got none"),
}


@pytest.mark.parametrize("what", INEXPRESSIBLE)
def test_what_a_format_cannot_express_is_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, format, message = INEXPRESSIBLE[what]
    first = load(write_head(tmp_path / "in", specforge_fields(), head_tensors()))
    changed = first._replace(config=dataclasses.replace(first.config, **changes))
    with pytest.raises(CheckpointError, match=message):
        export(changed, tmp_path / "out", format)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    first = load(write_head(tmp_path / "in", specforge_fields(), head_tensors()))
    unchecked: Any = inspect.unwrap(export_draft)
    with pytest.raises(CheckpointError, match="a format among specforge, speculators"):
        unchecked(first.head, first.config, tmp_path / "out", "gguf", target=target())
    assert not (tmp_path / "out").exists()


def test_a_shifted_first_layer_is_warned_of(tmp_path: Path) -> None:
    first = load(write_head(tmp_path / "in", specforge_fields((2, 3, 5)), head_tensors()))
    assert "SGLang" in export_draft(first.head, first.config, tmp_path / "out", target=target())[0]
