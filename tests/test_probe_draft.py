"""The probe finds which states a head reads, whatever its files say."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driver import FAST_COMPILE
from tiny import CONTEXT, write_tiny

import convert
from convert import probe_draft
from moespec_jax.checkpoint.head.tensor_table import random_head
from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.config import DraftConfig
from moespec_jax.nn.backend import Backend
from moespec_jax.nn.experts.dense import dense_experts
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model

LAYERS, TRUE = 4, (1, 2, 4)
DENSE = Backend("dense", "flat", False, dense_experts)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = write_tiny(tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)
    return load(str(directory), backend=DENSE)


def write_head(directory: Path, target: Model, told: tuple[int, ...]) -> Path:
    """A head that says what its last tapped state says through the target's own output matrix: right where that is
    what the target's last layer leaves, and where one token follows another of its kind."""
    d, vocab = target.config.hidden_size, target.config.vocab_size
    config = DraftConfig(
        vocab, vocab, d, d, 8, num_attention_heads=2, num_key_value_heads=1, head_dim=8, boundaries=told
    )
    head = random_head(config, target.params, jnp.arange(vocab, dtype=jnp.int32), jax.random.key(0))
    layer = head.layers[0]
    silent: Any = layer.replace(
        attention=layer.attention.replace(o=jnp.zeros_like(layer.attention.o)),
        mlp=layer.mlp.replace(down=jnp.zeros_like(layer.mlp.down)),
    )
    head = head.replace(fc=jnp.concatenate([jnp.zeros((2 * d, d)), jnp.eye(d)]), layers=(silent,))
    export_draft(head, config, directory, target=target.config)
    return directory


@pytest.fixture
def probe(target: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script; gives its exit status, output and errors."""
    monkeypatch.setattr(probe_draft, "load", functools.partial(load, backend=DENSE))
    monkeypatch.setattr(probe_draft.jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))

    def run(*arguments: object) -> tuple[int, str, str]:
        command = ["script", "--model", str(target.directory), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            convert.run(probe_draft.main)
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Rows of one token each, in which every state of the target is the same from position to position."""
    rows = np.repeat(np.random.default_rng(0).permutation(300)[:16], CONTEXT)
    file = tmp_path / "ids.txt"
    file.write_text("\n".join(map(str, rows)) + "\n")
    return file


def test_a_head_told_right(target: Model, probe: Any, ids: Path, tmp_path: Path) -> None:
    status, out, _ = probe("--draft-model", write_head(tmp_path / "head", target, TRUE), "--ids", ids)
    lines = out.splitlines()
    assert status == 0 and lines[0].startswith("the loader chose boundaries 1, 2, 4: eagle_config")
    # A shift of 1 would tap a layer that is not there.
    assert [line.split()[:2] for line in lines[2:4]] == [["-1", "0,1,3"], ["+0", "1,2,4"]] and len(lines) == 5
    assert "1.0000 best (the loader's choice)" in lines[3] and "best" not in lines[2]
    assert float(lines[2].split()[2]) < 0.7 and "the loader's choice is the best" in lines[4]


def test_a_head_told_one_too_low(target: Model, probe: Any, ids: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", target, TRUE)
    status, out, _ = probe("--draft-model", head, "--ids", ids, "--draft-boundaries", "0,1,3")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "the loader chose boundaries 0, 1, 3: as requested"
    assert lines[2].endswith("(the loader's choice)") and lines[3].endswith("1.0000 best")
    assert lines[4].endswith("use --draft-boundaries 1,2,4")


@pytest.mark.slow
def test_text_of_its_own_or_given(target: Model, probe: Any, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", target, (1, 2, 3))
    status, out, _ = probe("--draft-model", head, "--tokens", 2 * CONTEXT)
    assert status == 0 and [line.split()[0] for line in out.splitlines()[2:5]] == ["-1", "+0", "+1"]
    # The first token's state is only read, and what follows a row's last is not asked.
    assert f"over {2 * (CONTEXT - 1)} tokens" in out
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat")
    assert f"over {len(target.encode(text.read_text())) - 1} tokens" in probe("--draft-model", head, "--text", text)[1]


def test_errors_are_one_line(target: Model, probe: Any, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head", target, TRUE)
    (tmp_path / "short").write_text("1,2")
    (tmp_path / "unknown").write_text("1,2,320")
    (tmp_path / "words").write_text("a b c")
    for arguments, message in (
        (("--draft-model", "none"), "expected a draft head"),
        (("--draft-model", head, "--ids", tmp_path / "short"), "at least 3 tokens; it has 2"),
        (("--draft-model", head, "--ids", tmp_path / "unknown"), "token ids from 0 to 319"),
        (("--draft-model", head, "--ids", tmp_path / "words"), "numbers like 2,24,45"),
        (("--draft-model", head, "--text", tmp_path / "missing"), "No such file"),
        (("--draft-model", head, "--draft-boundaries", "2,x"), "--draft-boundaries as numbers"),
    ):
        status, _, err = probe(*arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
