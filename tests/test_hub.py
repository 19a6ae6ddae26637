"""Models by hub id, against a hub on this machine. Nothing here leaves it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from fake_hub import FakeHub, commit_of
from tiny import tiny_tensors, write_tiny

import moespec_jax
from moespec_jax.checkpoint.hub import locate
from moespec_jax.errors import CheckpointError
from moespec_jax.generate import main

ROOT = Path(__file__).parent.parent
TINY = "owner/tiny"
EMBEDDING = "model.embed_tokens.weight"
# What the files of a model that we read are; the fake repositories hold others too.
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("repositories")
    found = {"main": write_tiny(base / "main", seed=0), "v2": write_tiny(base / "v2", seed=1)}
    for directory in found.values():
        for name in ("README.md", "modeling_tiny.py", "tokenizer_tiny.py", "pytorch_model.bin", "model.gguf"):
            (directory / name).write_bytes(b"not for us")
    return found


@pytest.fixture
def hub(branches: dict[str, Path]) -> Iterator[FakeHub]:
    with FakeHub({TINY: branches, "owner/gated": branches}) as hub:
        hub.gated.add("owner/gated")
        yield hub


@pytest.fixture
def online(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub library of this process talks to the fake hub and has an empty cache."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    # Seen by main, which then leaves JAX's setting alone.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    return hub


def refused(model: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["--model", model, "--prompt", "the cat", *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_model_by_id(online: FakeHub, branches: dict[str, Path]) -> None:
    model = moespec_jax.load(TINY)
    np.testing.assert_array_equal(np.asarray(model.params.embed), tiny_tensors(seed=0)[EMBEDDING])
    for name in FILES:
        assert (model.directory / name).read_bytes() == (branches["main"] / name).read_bytes()


def test_only_what_is_read_is_fetched(online: FakeHub) -> None:
    locate(TINY)
    fetched = {request.rsplit("/", 1)[1] for request in online.requests if "/resolve/" in request}
    assert fetched == FILES


def test_a_second_load_fetches_nothing(online: FakeHub) -> None:
    first = locate(TINY)
    online.requests.clear()
    assert locate(TINY) == first
    assert not [request for request in online.requests if request.startswith("GET") and "/resolve/" in request]


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_a_revision_has_its_own_weights(online: FakeHub, branches: dict[str, Path], by: str) -> None:
    revision = "v2" if by == "branch" else commit_of(branches["v2"])
    assert locate(TINY).name == commit_of(branches["main"])
    model = moespec_jax.load(TINY, revision=revision)
    np.testing.assert_array_equal(np.asarray(model.params.embed), tiny_tensors(seed=1)[EMBEDDING])


def test_offline_uses_the_cache_and_asks_nobody(online: FakeHub) -> None:
    first = locate(TINY)
    online.requests.clear()
    assert locate(TINY, offline=True) == first
    assert online.requests == []
    with pytest.raises(CheckpointError, match=r"'owner/tiny' at revision 'v2'.*local cache \(--offline\)"):
        locate(TINY, revision="v2", offline=True)


def test_a_hub_that_fails_leaves_the_cache_usable(online: FakeHub) -> None:
    first = locate(TINY)
    online.failing = 500
    assert locate(TINY) == first


def test_unknown_model(online: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'owner/nobody': there is no such directory here and no such model" in refused("owner/nobody", capsys)


def test_unknown_revision(online: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(TINY, capsys, "--revision", "v3")
    assert "'owner/tiny' at revision 'v3': the model has no such revision" in line


def test_gated_model(online: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("owner/gated", capsys)
    assert "'owner/gated': the model is gated: accept its licence" in line


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_out_of_order_is_said_soon(online: FakeHub, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    online.failing = status
    started = time.monotonic()
    assert f"the hub gave no answer: Server error '{status}" in refused(TINY, capsys)
    assert time.monotonic() - started < 40


def test_no_hub_at_all_is_said_soon(
    online: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub({}) as gone:
        url = gone.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    started = time.monotonic()
    assert "the hub gave no answer" in refused(TINY, capsys)
    assert time.monotonic() - started < 40


def test_a_download_that_breaks_off_is_resumed(online: FakeHub, branches: dict[str, Path]) -> None:
    online.cut["model.safetensors"] = 1
    directory = locate(TINY)
    assert (directory / "model.safetensors").read_bytes() == (branches["main"] / "model.safetensors").read_bytes()
    gets = [request for request in online.requests if request.startswith("GET") and "safetensors" in request]
    assert len(gets) == 2


def test_a_download_that_fails_half_way_can_be_tried_again(
    online: FakeHub, branches: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    online.cut["model.safetensors"] = 1
    online.broken_after_cut.add("model.safetensors")
    with pytest.raises(CheckpointError, match="'owner/tiny': the download failed: .*500"):
        locate(TINY)
    capsys.readouterr()  # where the hub library says what happened
    assert "owner" in refused(TINY, capsys, "--offline")
    online.broken_after_cut.clear()
    directory = locate(TINY)
    assert (directory / "model.safetensors").read_bytes() == (branches["main"] / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_command_line_with_a_hub_id(hub: FakeHub, branches: dict[str, Path], tmp_path: Path) -> None:
    """The whole way, each in a process of its own: download, then the same from the cache when the hub has gone."""
    of_directory = moespec_jax.load(str(branches["main"])).generate("the cat", max_new_tokens=4).prompts[0]
    downloaded = run_command(hub.url, tmp_path)
    hub.requests.clear()
    cached = run_command(hub.url, tmp_path, "--offline")
    assert hub.requests == []
    assert downloaded == cached == of_directory.token_ids


def run_command(endpoint: str, home: Path, *more: str) -> list[int]:
    command = [sys.executable, "-m", "moespec_jax.generate", "--model", TINY, "--prompt", "the cat", *more]
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(home / "xdg"),
    }
    done = subprocess.run(
        [*command, "--max-new-tokens", "4", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["prompts"][0]["token_ids"]
