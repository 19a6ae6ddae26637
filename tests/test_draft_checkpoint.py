"""Heads of three formats and two kinds of file load into the same head, or are refused in one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_heads import (
    DRAFT_VOCAB,
    FFN,
    HEAD,
    IDS,
    KV_HEADS,
    MODEL,
    VOCAB,
    Tensors,
    eagle_fields,
    head_tensors,
    renamed,
    same_tree,
    specforge_fields,
    speculators_fields,
    target,
    write_head,
)
from safetensors.numpy import load_file, save_file

from moespec_jax.checkpoint.head.read import LoadedDraft, load_draft, share_lm_head
from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.cache import Cache
from moespec_jax.nn.eagle3 import draft_forward, draft_logits, fuse_aux

NORMS = {"midlayer.self_attn.q_norm.weight": (HEAD,), "midlayer.self_attn.k_norm.weight": (HEAD,)}
EMBEDDING = {"embed_tokens.weight": (VOCAB, MODEL)}


def load(directory: Path, dtype: Any = np.float32, **options: Any) -> LoadedDraft:
    return load_draft(directory, target(), dtype, **options)


def test_every_tensor_lands_where_its_name_says(tmp_path: Path) -> None:
    tensors = head_tensors(layers=2, extra=NORMS | {f"midlayer.1.{name[9:]}": s for name, s in NORMS.items()})
    head = load(write_head(tmp_path, eagle_fields(), tensors)).head
    found = {"fc.weight": head.fc.T, "norm.weight": head.norm, "lm_head.weight": head.lm_head}
    for at, layer in zip(("midlayer.", "midlayer.1."), head.layers, strict=True):
        found[f"{at}input_layernorm.weight"] = layer.input_norm
        found[f"{at}post_attention_layernorm.weight"] = layer.post_attention_norm
        if layer.hidden_norm is not None:
            found[f"{at}hidden_norm.weight"] = layer.hidden_norm
        for name in "qkv":
            found[f"{at}self_attn.{name}_proj.weight"] = getattr(layer.attention, name)
        found[f"{at}self_attn.o_proj.weight"] = layer.attention.o.T
        for name in ("q_norm", "k_norm"):
            found[f"{at}self_attn.{name}.weight"] = getattr(layer.attention, name)
        for name in ("gate", "up", "down"):
            found[f"{at}mlp.{name}_proj.weight"] = getattr(layer.mlp, name).T
    assert found.keys() | {"d2t", "t2d"} == tensors.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(np.asarray(value), tensors[name], err_msg=name)
    np.testing.assert_array_equal(np.asarray(head.target_ids), IDS)
    assert head.target_ids.dtype == jnp.int32 and head.embed is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("torch", [False, True])
def test_formats_and_spellings_load_into_the_same_head(dtype: str, torch: bool, tmp_path: Path) -> None:
    tensors = head_tensors(jnp.dtype(dtype))
    heads = [
        (eagle_fields(), tensors),
        (specforge_fields((1, 3, 4)), tensors | {"rotary_emb.inv_freq": np.ones(4, np.float32)}),
        (speculators_fields((2, 4, 5), norm_before_residual=False), renamed(tensors)),
        # NeMo's spelling, and that of several layers.
        (specforge_fields((1, 3, 4)), {f"model.{name}": tensor for name, tensor in renamed(tensors).items()}),
        (specforge_fields((1, 3, 4)), {n.replace("midlayer.", "midlayer.0."): tensor for n, tensor in tensors.items()}),
        (specforge_fields((1, 3, 4)), {name: tensor for name, tensor in tensors.items() if name != "t2d"}),
    ]
    loaded = [load(write_head(tmp_path / str(i), *head, torch=torch), "bfloat16") for i, head in enumerate(heads)]
    for other in loaded[1:]:
        assert same_tree(loaded[0].head, other.head) and other.config == loaded[0].config
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded[0].head)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}


@pytest.mark.parametrize("name", [name for name in head_tensors(extra=EMBEDDING | NORMS) if name != "t2d"])
@pytest.mark.parametrize("torch", [False, True])
def test_every_missing_tensor_is_named(name: str, torch: bool, tmp_path: Path) -> None:
    tensors = head_tensors(extra=EMBEDDING | NORMS)
    del tensors[name]
    directory = write_head(tmp_path, specforge_fields(), tensors, torch)
    if name in EMBEDDING:  # then the target's is shared
        assert load(directory).head.embed is None
        return
    with pytest.raises(CheckpointError, match=rf"expected .*{name}.* in |expected d2t .*; there is none|{name}.* \("):
        load(directory)


def test_a_narrow_head_must_bring_its_embedding(tmp_path: Path) -> None:
    fields = eagle_fields(target_hidden_size=32)
    with pytest.raises(CheckpointError, match="1 missing: embed_tokens.weight"):
        load_draft(write_head(tmp_path / "a", fields, head_tensors(width=32)), target(hidden_size=32), None)
    whole = write_head(tmp_path / "b", fields, head_tensors(width=32, extra=EMBEDDING))
    first = load_draft(whole, target(hidden_size=32), None)
    export_draft(first.head, first.config, tmp_path / "c", "speculators", target=target(hidden_size=32))
    again = load_draft(tmp_path / "c", target(hidden_size=32), None)
    assert again.config == first.config and same_tree(again.head, first.head)


def change(**edits: Any) -> Callable[[Path], object]:
    """Replaces tensors, `__` for a dot, by a value or by a function of the old one."""

    def edit(directory: Path) -> None:
        tensors: Tensors = load_file(directory / "model.safetensors")
        for name, value in edits.items():
            name = name.replace("__", ".")
            tensors[name] = np.ascontiguousarray(value(tensors[name]) if callable(value) else value)
        save_file(tensors, directory / "model.safetensors")

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 900), "expected a whole safetensors file"),
    "no weights": (lambda d: os.remove(d / "model.safetensors"), "expected .*safetensors .* in .*; there is neither"),
    "no config": (lambda d: os.remove(d / "config.json"), "expected a file config.json"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter_config.json is a PEFT adapter's"),
    "unknown": (change(extra=np.ones(3, np.float32)), "1 unknown: extra in "),
    "twice": (change(model__norm__weight=np.ones(MODEL, np.float32)), r"doubly assigned: norm.weight \(as .* and "),
    "misshapen": (change(norm__weight=lambda a: a[:8]), r"norm.weight \(expected \[16\], got \[8\]\)"),
    "type": (change(norm__weight=lambda a: a.astype(np.float64)), r"unsupported dtype: norm.weight \(F64\)"),
    "vector": (change(fc__weight=lambda a: a[0]), "fc.weight to be a matrix"),
    "map type": (change(d2t=lambda a: a.astype(np.float32)), r"unsupported dtype: d2t \(float32\)"),
    "map size": (change(d2t=lambda a: a[1:]), "expected d2t as 12 integers"),
    "mask size": (change(t2d=lambda a: a[1:]), "expected t2d as 40 booleans"),
    "map beyond": (change(d2t=lambda a: a + 1), "different and below 40"),
    "map huge": (change(d2t=lambda a: a * 0 + (2**63 - 1)), "different and below 40"),
    "map repeats": (change(d2t=lambda a: a[::-1]), "different and below 40"),
    "contradiction": (change(t2d=lambda a: np.roll(a, 1)), "d2t and t2d to name the same tokens"),
    "vocabulary": (change(lm_head__weight=np.ones((41, MODEL), np.float32)), "lm_head.weight has 41 rows"),
    "mlp": (change(midlayer__mlp__up_proj__weight=lambda a: a[1:]), rf"up_proj.weight \(expected \[{FFN}, 16\]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    damage(write_head(tmp_path, specforge_fields(), head_tensors()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    change(norm__weight=np.full(MODEL, 1e30, np.float32))(write_head(tmp_path, specforge_fields(), head_tensors()))
    with pytest.raises(CheckpointError, match="norm.weight of .* holds larger ones"):
        load(tmp_path, "float16")


def test_absolute_ids_in_place_of_offsets_are_taken_with_a_warning(tmp_path: Path) -> None:
    directory = write_head(tmp_path, specforge_fields(), head_tensors() | {"d2t": IDS.astype(np.int64)})
    loaded = load(directory)
    np.testing.assert_array_equal(np.asarray(loaded.head.target_ids), IDS)
    assert any("d2t holds the target's ids themselves" in note for note in loaded.notes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("t2d", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
def test_tokens_in_any_order_are_those_of_the_sorted_head(absolute: bool, t2d: bool, seed: int, tmp_path: Path) -> None:
    """ModelOpt lists them by frequency: offsets may be negative."""
    order = np.random.default_rng(seed).permutation(DRAFT_VOCAB)
    tensors = head_tensors()
    expected = load(write_head(tmp_path / "sorted", specforge_fields(), tensors))
    ids = IDS[order].astype(np.int64)
    shuffled = tensors | {
        "lm_head.weight": tensors["lm_head.weight"][order],
        "d2t": ids if absolute else ids - np.arange(DRAFT_VOCAB),
    }
    if not t2d:
        del shuffled["t2d"]
    directory = write_head(tmp_path / "shuffled", specforge_fields(), shuffled)
    if absolute and not t2d:  # engines add offsets to indices, which here gives ids that are equal or too large
        with pytest.raises(CheckpointError, match="different and below 40"):
            load(directory)
        return
    found = load(directory)
    assert same_tree(found.head, expected.head) and found.config == expected.config
    assert any("d2t holds the target's ids themselves" in note for note in found.notes) == absolute
    export_draft(found.head, found.config, tmp_path / "out", target=target())
    assert same_tree(load(tmp_path / "out").head, expected.head)


def test_ids_that_two_conventions_read_differently_are_named(tmp_path: Path) -> None:
    """Offsets would be 1, 3, 5, ..., ids 1, 2, 3, ...: without `t2d` nothing decides, and engines add offsets."""
    d2t = np.arange(1, DRAFT_VOCAB + 1)
    tensors = {name: tensor for name, tensor in head_tensors().items() if name != "t2d"}
    loaded = load(write_head(tmp_path, specforge_fields(), tensors | {"d2t": d2t}))
    np.testing.assert_array_equal(np.asarray(loaded.head.target_ids), d2t + np.arange(DRAFT_VOCAB))
    assert any("ambiguous" in note and "python -m convert.probe_draft" in note for note in loaded.notes)
    plain = load(write_head(tmp_path / "plain", specforge_fields(), head_tensors()))
    assert not any("ambiguous" in note for note in plain.notes)


def whole(**fields: Any) -> dict[str, Any]:
    return specforge_fields(draft_vocab_size=VOCAB, **fields)


WITHOUT = {name: tensor for name, tensor in head_tensors(full=True).items() if name != "lm_head.weight"}
IDENTITY = {"d2t": np.zeros(VOCAB, np.int64), "t2d": np.ones(VOCAB, bool)}
SHARING: dict[str, tuple[dict[str, Any], Tensors]] = {
    "SpecForge": (whole(), WITHOUT),
    "no size": (specforge_fields(draft_vocab_size=None), WITHOUT),
    "speculators": (speculators_fields(draft_vocab_size=VOCAB), renamed(WITHOUT)),
    "own embedding": (whole(), WITHOUT | {"embed_tokens.weight": np.ones((VOCAB, MODEL), np.float32)}),
    "identity map": (whole(), WITHOUT | IDENTITY),
}


@pytest.mark.parametrize("what", SHARING)
def test_a_head_may_share_the_target_s_output_matrix(what: str, tmp_path: Path) -> None:
    fields, tensors = SHARING[what]
    matrix = np.random.default_rng(3).normal(size=(VOCAB, MODEL)).astype(np.float32)
    found = load(write_head(tmp_path / "without", fields, tensors))
    assert found.head.lm_head is None and any("shares the target's" in note for note in found.notes)
    expected = load(write_head(tmp_path / "with", fields, tensors | {"lm_head.weight": matrix}))
    shared = share_lm_head(found, jnp.asarray(matrix))
    assert same_tree(shared.head, expected.head) and shared.config == expected.config
    assert share_lm_head(expected, jnp.asarray(matrix) * 2) is expected


ALONE: dict[str, tuple[dict[str, Any], Tensors]] = {
    "smaller vocabulary": (specforge_fields(), WITHOUT),
    "map": (specforge_fields(draft_vocab_size=None), WITHOUT | {"d2t": IDS - np.arange(DRAFT_VOCAB)}),
    "tied": (whole(tie_word_embeddings=True), WITHOUT | {"embed_tokens.weight": np.ones((VOCAB, MODEL), np.float32)}),
    "tied to another": (whole(tie_word_embeddings=True), WITHOUT),
    "other order": (whole(), WITHOUT | {"d2t": np.arange(VOCAB)[::-1] - np.arange(VOCAB)}),
    "other width": (eagle_fields(target_hidden_size=32, draft_vocab_size=VOCAB), WITHOUT),
}


@pytest.mark.parametrize("what", ALONE)
def test_an_output_matrix_that_is_no_one_else_s_is_missing(what: str, tmp_path: Path) -> None:
    fields, tensors = ALONE[what]
    if what == "other width":
        tensors = tensors | {"fc.weight": np.ones((MODEL, 3 * 32), np.float32)}
    directory = write_head(tmp_path, fields, tensors)
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight|expected d2t as 40|expected lm_head.weight"):
        load_draft(directory, target(hidden_size=32 if what == "other width" else MODEL), np.float32)


def test_a_loaded_head_runs(tmp_path: Path) -> None:
    loaded = load(write_head(tmp_path, specforge_fields(), head_tensors()))
    config, head = loaded.config, loaded.head
    features = fuse_aux(config, head, jnp.ones((1, 3, config.aux_size)))
    rows = jnp.zeros((1, KV_HEADS, 3, HEAD))
    cache = Cache((rows,), (rows,), jnp.zeros((1,), jnp.int32))
    mask = jnp.tril(jnp.ones((3, 3), bool))[None]
    positions = jnp.arange(3, dtype=jnp.int32)[None]
    outputs, _ = draft_forward(config, head, jnp.ones((1, 3, MODEL)), features, positions, mask, cache)
    assert draft_logits(config, head, outputs).shape == (1, 3, DRAFT_VOCAB)
