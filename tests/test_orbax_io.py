"""Damaged orbax directories are refused in one line. That whole ones load is in test_convert.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_models import draw_fields
from published import draw_tensors, write

from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_safetensors, read_json
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("orbax")
    fields = draw_fields("olmoe", 0)
    write(directory, fields, draw_tensors(fields))
    config = load_config(directory)
    write_orbax(open_safetensors(directory, config), config, directory)
    (directory / "model.safetensors").unlink()
    return directory


def _manifest(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        manifest = read_json(root / "manifest.json")
        edit(manifest)
        (root / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _truncate_data(root: Path) -> None:
    files = [file for file in (root / "layers" / "001").rglob("*") if file.is_file() and file.parent.name == "d"]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _replace_piece(root: Path) -> None:
    """The same names with other shapes, behind the manifest's back."""
    import orbax.checkpoint as ocp

    shutil.rmtree(root / "base")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {name: np.ones((2, 2), np.float32) for name in ("embed", "norm", "lm_head")}
        checkpointer.save(root / "base", args=ocp.args.PyTreeSave(tree))


GATE = "layers/001/experts/gate"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda r: (r / "manifest.json").unlink(),
        "expected a file manifest.json in .*orbax; there is none",
    ),
    "another format": (
        _manifest(lambda m: m.update(format="x")),
        "expected the format 'moespec_jax 1' in .*; got 'x'",
    ),
    "arrays are a list": (_manifest(lambda m: m.update(arrays=[])), "expected an object 'arrays'"),
    "surplus array": (_manifest(lambda m: m["arrays"].update(extra={})), "got 1 unknown: extra in "),
    "missing array": (_manifest(lambda m: m["arrays"].pop(GATE)), f"got 1 missing: {GATE} in "),
    "other shape": (
        _manifest(lambda m: m["arrays"][GATE].update(shape=[1])),
        rf"1 misshapen: {GATE} \(.* got \[1\]\)",
    ),
    "other dtype": (
        _manifest(lambda m: m["arrays"][GATE].update(dtype="int8")),
        rf"1 not float32.*: {GATE} \('int8'\)",
    ),
    "false dtype": (
        _manifest(lambda m: m["arrays"][GATE].update(dtype="float16")),
        f"expected {GATE} as float16.*, as in manifest.json; it is float32",
    ),
    "missing piece": (lambda r: shutil.rmtree(r / "layers" / "001"), "expected an orbax checkpoint at .*layers/001"),
    "empty piece": (
        lambda r: (shutil.rmtree(r / "base"), (r / "base").mkdir()),
        "expected base/embed whole in .*orbax/base; ",
    ),
    "truncated data": (_truncate_data, "expected layers/001/.* whole in .*orbax/layers/001; "),
    "other piece": (
        _replace_piece,
        r"expected base/embed as float32\[.*\], as in manifest.json; it is float32\[2, 2\]",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_in_one_line(
    damage: Callable[[Path], object], message: str, converted: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(converted, tmp_path / "model")
    damage(directory / "orbax")
    with pytest.raises(CheckpointError, match=message) as raised:
        load_parameters(directory, load_config(directory), BACKENDS["switch"], "float32")
    assert "\n" not in str(raised.value) and str(directory) in str(raised.value)
