"""Targets of few layers: three boundaries by default, and heads that are exported or refused by name."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from driver import build, random_tensors
from test_train import same_bits
from tiny import CONFIG

import moespec_jax.train.__main__ as command
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.head.read import load_draft
from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.checkpoint.head.write import FORMATS, ExportFormat, export_draft
from moespec_jax.errors import CheckpointError, RequestError
from moespec_jax.nn.backend import BACKENDS

FLAGS = ["--model", "m", "--data", "d", "--output", "o", "--intermediate-size", "24"]


@pytest.mark.parametrize("layers", range(1, 49))
def test_default_boundaries_are_three_of_every_target(layers: int) -> None:
    """EAGLE-3's from 7 layers on; below, 0 and L only where there are no three others."""
    if layers == 1:
        with pytest.raises(RequestError, match="at least 2 layers.*got 1"):
            command.boundaries(None, layers)
        return
    found = command.boundaries(None, layers)
    assert len(set(found)) == 3 and list(found) == sorted(found) and 0 <= found[0] and found[2] <= layers
    assert {0, layers}.isdisjoint(found) == (layers > 3) and (0 in found) == (layers == 2)
    if layers >= 7:
        assert found == (2, layers // 2, layers - 3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layers", range(2, 7))
def test_a_head_of_a_small_target_is_exported(tmp_path: Path, layers: int, format: ExportFormat) -> None:
    target = read_config(CONFIG | {"num_hidden_layers": layers})
    draft = command.draft_config(command._parser().parse_args(FLAGS), target)
    params = build(target, random_tensors(target, seed=1), BACKENDS["switch"])
    head = random_head(draft, params, jnp.arange(320, dtype=jnp.int32), jax.random.key(0))
    files = dict(target=target, target_embedding=params.embed)
    if layers == 2 and format == "specforge":
        with pytest.raises(CheckpointError, match=r"boundary 0.*choose the format speculators \(--format\)$"):
            export_draft(head, draft, tmp_path, format, **files)
        return
    notes = export_draft(head, draft, tmp_path, format, **files)
    assert any("the target's last" in note for note in notes) == (layers == 3 and format == "specforge")
    loaded = load_draft(tmp_path, target, None)
    assert loaded.config.boundaries == draft.boundaries and loaded.format == format
    assert same_bits(dataclasses.replace(loaded.head, embed=head.embed), head)
