"""A tiny target with a random head on disk, and the command line run on them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from speculation import draft_config, small_head
from tiny import write_tiny

from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.generate import main
from moespec_jax.nn.backend import BACKENDS


def write_pair(directory: Path, new: int, **changes: Any) -> list[str]:
    """Flags of a tiny target and a random head for it, in SpecForge's format."""
    target = write_tiny(directory / "target", num_hidden_layers=3, **changes)
    config = load_config(target)
    params = load_parameters(target, config, BACKENDS["switch"], jnp.float32)
    draft = draft_config(config, draft_vocab_size=300, boundaries=(1, 2, 3))
    export_draft(small_head(draft, params), draft, directory / "head", target=config)
    return [
        "--model",
        str(target),
        "--draft-model",
        str(directory / "head"),
        "--max-new-tokens",
        str(new),
        "--ignore-eos",
    ]


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The one JSON object that a good run prints."""
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out)
