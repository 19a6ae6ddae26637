"""Values that are not finite are told by tensor, and files by the hashes that the hub calls them by."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_models import draw_fields
from published import draw_tensors, write
from test_convert import refused, run
from tiny_pair import write_pair

from convert import check, draft, to_hf, to_orbax
from convert.integrity import check_hashes, count_not_finite
from moespec_jax.checkpoint.head.read import load_draft
from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.checkpoint.read import load_config
from moespec_jax.errors import CheckpointError

NORM, ROUTER = "model.norm.weight", "model.layers.1.mlp.gate.weight"


def write_spoilt(directory: Path, dtype: str = "float32") -> Path:
    fields = draw_fields("olmoe", 0)
    tensors = draw_tensors(fields, dtype)
    tensors[NORM][:3] = np.nan, np.inf, -np.inf
    tensors[ROUTER][0, 0] = np.nan
    return write(directory, fields, tensors, shards=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_counts(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros((7, 5), dtype)
    array[0, 0], array[6, 4], array[3] = np.nan, -np.inf, np.inf
    for block in (1, 12, 1 << 22):
        monkeypatch.setattr("convert.integrity._BLOCK", block)
        assert count_not_finite(array) == count_not_finite(array.T) == 7
    assert count_not_finite(np.zeros(0, dtype)) == 0 and count_not_finite(np.array(np.nan, dtype)) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_tensors_are_named(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(check.main, monkeypatch, capsys, "--model", write_spoilt(tmp_path, dtype), "--files")
    shapes = {name: tensor.size for name, tensor in draw_tensors(draw_fields("olmoe", 0)).items()}
    assert "expected weights that are finite; got " in line
    assert f"{NORM} (3 of {shapes[NORM]} are not)" in line and f"{ROUTER} (1 of {shapes[ROUTER]} are not)" in line


def test_conversions_refuse_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_spoilt(tmp_path / "a")
    for script in (to_orbax, to_hf):
        line = refused(script.main, monkeypatch, capsys, "--model", tmp_path / "a", "--output", tmp_path / "b")
        assert "expected weights that are finite; got model." in line and "--allow-non-finite" in line
        assert {path.name for path in tmp_path.iterdir()} == {"a"}
    asked = ["--model", tmp_path / "a", "--output", tmp_path / "b", "--allow-non-finite"]
    assert run(to_orbax.main, monkeypatch, *asked) == 0
    capsys.readouterr()
    assert NORM in refused(check.main, monkeypatch, capsys, "--model", tmp_path / "b", "--files")


def test_a_heads_conversion_refuses_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, target, _, head, *_ = write_pair(tmp_path, 1)
    config = load_config(Path(target))
    loaded = load_draft(Path(head), config, None)
    spoilt = loaded.head.__class__(**(vars(loaded.head) | {"fc": loaded.head.fc.at[1, 2].set(np.nan)}))
    export_draft(spoilt, loaded.config, tmp_path / "spoilt", target=config)
    asked = ["--model", target, "--draft-model", tmp_path / "spoilt", "--format", "specforge"]
    line = refused(draft.main, monkeypatch, capsys, *asked, "--output", tmp_path / "out")
    assert f"got fc (1 of {loaded.head.fc.size} are not)" in line and not (tmp_path / "out").exists()
    assert run(draft.main, monkeypatch, *asked, "--output", tmp_path / "out", "--allow-non-finite") == 0


def as_cached(model: Path, cache: Path) -> Path:
    """The files as the hub library keeps them: blobs by their hash, and links to them."""
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git
        (cache / "blobs" / name).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / name)
    return snapshot


def test_a_flipped_bit_in_the_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = draw_fields("olmoe", 0)
    snapshot = as_cached(write(tmp_path / "model", fields, draw_tensors(fields), shards=2), tmp_path / "cache")
    assert run(check.main, monkeypatch, "--model", snapshot, "--files") == 0
    assert capsys.readouterr().out.startswith("3 files are as the hub has them; of 0 no hash is known; ")
    shard = (snapshot / "model-00002-of-00002.safetensors").resolve()
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    line = refused(check.main, monkeypatch, capsys, "--model", snapshot, "--files")
    assert "expected files as the hub has them in" in line and f"{shard.name[:12]}..." in line
    assert "got model-00002-of-00002.safetensors (" in line
    shard.unlink()
    assert "(not downloaded)" in refused(check.main, monkeypatch, capsys, "--model", snapshot, "--files")


def test_a_download_into_a_directory_has_its_hashes_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    note = notes / "a.safetensors.metadata"
    note.write_text(f"{'0' * 40}\n{hashlib.sha256(b'weights').hexdigest()}\n1700000000.0\n")
    assert check_hashes(tmp_path) == (1, 1)
    (tmp_path / "a.safetensors").write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match="got a.safetensors"):
        check_hashes(tmp_path)
    note.write_text("torn")
    assert check_hashes(tmp_path) == (0, 2)
