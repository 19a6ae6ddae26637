"""DFlash and DSpark heads of three formats load into the same head, are written so that they load again, or are refused
in one line; and what the packages that publish them compute is computed here."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import dflash_oracle as oracle
import numpy as np
import pytest
from dflash_files import (
    deepspec_fields,
    published_tensors,
    speculators_fields,
    write_block_head,
    zlab_fields,
)
from dflash_oracle import BASE, MODEL, VARIANTS, VOCAB
from draft_heads import same_tree, write_head
from draft_heads import target as eagle_target

from moespec_jax.checkpoint.head.boundaries import resolve_taps
from moespec_jax.checkpoint.head.dflash_write import export_block_draft
from moespec_jax.checkpoint.head.read import LoadedBlockDraft, load_any_draft, share_lm_head
from moespec_jax.config import DecoderConfig
from moespec_jax.dflash_config import DFlashConfig
from moespec_jax.errors import CheckpointError


def target(hidden_size: int = MODEL, layers: int = 8) -> DecoderConfig:
    return dataclasses.replace(eagle_target(layers=layers, hidden_size=hidden_size), vocab_size=VOCAB)


def load(directory: Path, width: int = MODEL, dtype: Any = None, **options: Any) -> LoadedBlockDraft:
    loaded = load_any_draft(directory, target(width), dtype, **options)
    assert isinstance(loaded, LoadedBlockDraft)
    return loaded


def of(variant: str, **changes: Any) -> DFlashConfig:
    return dataclasses.replace(BASE, **VARIANTS[variant] | changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_of_speculators_load_and_are_written_bit_for_bit(variant: str, tmp_path: Path) -> None:
    config = of(variant, sliding_windows=(3, 0, 3)) if variant == "windows" else of(variant)
    if not config.anchored_windows:
        with pytest.raises(CheckpointError, match="it cannot: windows counted from each row, windows of unequal size"):
            export_block_draft(oracle.head_of(config), config, tmp_path, target=target())
        return
    if variant == "windows":
        config = dataclasses.replace(config, causal=(True, False, True))
    head = oracle.head_of(config)
    loaded = load(write_block_head(tmp_path / "a", speculators_fields(config), config, head), config.target_hidden_size)
    assert loaded.config == config and same_tree(loaded.head, head) and loaded.format == "speculators"
    if config.target_hidden_size != config.hidden_size:
        with pytest.raises(CheckpointError, match="it cannot: target_hidden_size 40"):
            export_block_draft(head, config, tmp_path / "b", target=target(40))
        return
    export_block_draft(loaded.head, config, tmp_path / "b", target=target())
    again = load(tmp_path / "b")
    assert again.config == config and same_tree(again.head, head)


def test_formats_load_into_the_same_head(tmp_path: Path) -> None:
    """z-lab's ids are outputs of layers, and so are DeepSpec's, whose -1 is the embedding."""
    plain = of("full vocabulary", boundaries=(1, 2, 4))
    spark = of("vanilla", draft_vocab_size=VOCAB, own_embedding=True)
    for config, fields in ((plain, zlab_fields(plain)), (spark, deepspec_fields(spark))):
        head = oracle.head_of(config)
        directory = write_block_head(tmp_path / config.markov, fields, config, head)
        prefixed = write_head(tmp_path / f"{config.markov} prefixed", fields, published_tensors(config, head, "model."))
        for found in (load(directory), load(prefixed)):
            assert found.config == config and same_tree(found.head, head)
        assert "each the output of a layer" in found.notes[0]


def test_a_head_without_output_matrix_shares_the_target_s(tmp_path: Path) -> None:
    config = of("full vocabulary", boundaries=(1, 2, 4))
    head = oracle.head_of(config)
    directory = write_block_head(tmp_path / "a", zlab_fields(config), config, head, lm_head__weight=None)
    loaded = load(directory)
    assert loaded.head.lm_head is None and head.lm_head is not None
    shared = share_lm_head(loaded, head.lm_head)
    assert same_tree(shared.head, head)
    export_block_draft(shared.head, shared.config, tmp_path / "b", target=target(), shares_lm_head=True)
    again = load(tmp_path / "b")
    assert again.head.lm_head is None and same_tree(share_lm_head(again, head.lm_head).head, head)
    partial = of("base")
    files = write_block_head(tmp_path / "c", speculators_fields(partial), partial, head, lm_head__weight=None)
    with pytest.raises(CheckpointError, match="1 missing: lm_head.weight"):
        load(files)


def test_tokens_in_any_order_are_those_of_the_sorted_head(tmp_path: Path) -> None:
    config = of("vanilla")
    head = oracle.head_of(config)
    order = np.random.default_rng(2).permutation(config.draft_vocab_size)
    tensors = published_tensors(config, head)
    ids = np.asarray(head.target_ids).astype(np.int64)
    tensors |= {n: tensors[n][order] for n in ("lm_head.weight", "markov_head.markov_w2.weight")}
    tensors["d2t"] = ids[order] - np.arange(len(ids))
    assert same_tree(load(write_head(tmp_path, speculators_fields(config), tensors)).head, head)


TAPS: dict[str, tuple[dict[str, Any], bool, tuple[int, ...], str]] = {
    "z-lab": ({"target_layer_ids": [1, 12, 23, 34, 45]}, False, (2, 13, 24, 35, 46), "each the output of a layer"),
    "z-lab by default": ({}, False, (2, 13, 24, 35, 46), "states none: outputs of layers 1 to L-3, with L = 48"),
    "z-lab's last": ({"target_layer_ids": [1, 47]}, False, (2, 48), "z-lab's code reads it after"),
    "DeepSpec's embedding": ({"target_layer_ids": [-1, 20]}, False, (0, 21), "each the output of a layer"),
    "RedHat's Qwen3-30B": (
        {"aux_hidden_state_layer_ids": [1, 12, 23, 34, 45]}, True, (1, 12, 23, 34, 45),
        "each the boundary before a layer; ambiguous, since z-lab's default .* python -m convert.probe_draft",
    ),
    "speculators": ({"aux_hidden_state_layer_ids": [2, 13, 45]}, True, (2, 13, 45), "the boundary before a layer$"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAPS)
def test_boundaries_by_format(what: str) -> None:
    fields, speculators, values, origin = TAPS[what]
    found = resolve_taps(({}, fields), speculators, target(layers=48), 5)
    assert found.values == values
    assert re.search(origin, found.origin)
    assert resolve_taps(({}, fields), speculators, target(layers=48), 5, explicit=(3, 7)).values == (3, 7)


IDS: dict[str, Any] = {"target_layer_ids": [0, 1, 3]}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "DFlash 2": ("base", dict(architectures=["DFlash2DraftModel"]), {}, "architectures among DFlashDraftModel"),
    "Gemma": ("base", dict(architectures=["Gemma4DSparkModel"]), {}, "architectures among DFlashDraftModel"),
    "selector": ("base", dict(selector_rank=256), {}, "selector_rank 256 is not supported"),
    "softcap": ("base", dict(final_logit_softcapping=20.0), {}, "final_logit_softcapping 20.0 is not supported"),
    "multiplier": ("base", dict(output_multiplier=0.2), {}, "output_multiplier 0.2 is not supported"),
    "quantized": ("base", dict(quantization_config={"bits": 4}), {}, "quantization_config is not supported"),
    "no mask": ("base", dict(dflash_config=IDS), {}, "expected mask_token_id from 0 to 47; config.json has None"),
    "mask beyond": ("base", dict(dflash_config=IDS | {"mask_token_id": 48}), {}, "expected mask_token_id from 0 to 47"),
    "block": ("base", dict(block_size=1), {}, "expected block_size of at least 2"),
    "kinds": ("base", dict(layer_types=["full_attention"]), {}, "expected layer_types of 2 layers"),
    "chunks": ("base", dict(layer_types=["chunked", "chunked"]), {}, "each full_attention or sliding_attention"),
    "ids": ("base", dict(dflash_config={"mask_token_id": 1, "target_layer_ids": [3, 1, 2]}), {}, "strictly increasing"),
    "taps": ("base", dict(dflash_config={"mask_token_id": 1, "target_layer_ids": [1, 2]}), {}, "a head for 2 states"),
    "Markov": ("base", {}, dict(markov_head__markov_w1__weight=np.ones((48, 6), np.float32)), "a DSpark head .*row"),
    "Laguna": ("base", {}, dict(layers__0__self_attn__g_proj__weight=np.ones((2, 2), np.float32)), "parts of others"),
    "unknown": ("base", {}, dict(extra=np.ones(3, np.float32)), "1 unknown: extra in"),
    "missing": ("base", {}, dict(hidden_norm__weight=None), "1 missing: hidden_norm.weight in"),
    "misshapen": ("base", {}, dict(norm__weight=np.ones(3, np.float32)), r"norm.weight \(expected \[32\], got \[3\]\)"),
    "norms": ("base", {}, dict(layers__1__self_attn__q_norm__weight=None), "1 missing: layers.1.self_attn.q_norm"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_heads_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    variant, fields, tensors, message = REFUSED[what]
    config = of(variant, boundaries=(1, 2, 4), draft_vocab_size=VOCAB)
    directory = write_block_head(tmp_path, zlab_fields(config) | fields, config, oracle.head_of(config), **tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


SPARK_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "form": (
        dict(markov_head_type="gru"),
        "expected markov_head_type among vanilla, gated, rnn; config.json has 'gru'",
    ),
    "rank": (dict(markov_rank=-1), "expected markov_rank to be an integer from 1"),
    "no Markov": (dict(markov_rank=0), "expected a Markov head where confidence_head_with_markov is true"),
    "no ids": (dict(aux_hidden_state_layer_ids=None), "lacks the field 'aux_hidden_state_layer_ids'"),
    "other kind": (dict(speculators_model_type="dflash2"), "expected speculators_model_type eagle3, dflash or dspark"),
}


@pytest.mark.parametrize("what", SPARK_REFUSED)
def test_other_files_of_speculators_are_refused(what: str, tmp_path: Path) -> None:
    fields, message = SPARK_REFUSED[what]
    config = of("vanilla")
    directory = write_block_head(tmp_path, speculators_fields(config, **fields), config, oracle.head_of(config))
    with pytest.raises(CheckpointError, match=message):
        load(directory)
