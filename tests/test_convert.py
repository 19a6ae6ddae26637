"""The conversion scripts: there and back is the same bytes, killed runs leave nothing that loads, errors are a line."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_models import FAMILIES, draw_fields
from published import DTYPES, draw_tensors, same, write
from safetensors.numpy import load_file
from tiny import byte_level_tokenizer, write_json

import convert
from convert import check, to_hf, to_orbax
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.read import load_config, load_parameters, read_json
from moespec_jax.errors import CheckpointError
from moespec_jax.nn.backend import BACKENDS

ROOT = Path(__file__).parent.parent


def run(script: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of a script with these arguments."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        convert.run(script)
    return int(stopped.value.code or 0)


def refused(
    script: Callable[[], int], mp: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> str:
    """The one line of a script that must end with status 2."""
    capsys.readouterr()
    assert run(script, mp, *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Qwen3-MoE in two shards, with what is usually beside the weights."""
    fields = draw_fields("qwen3_moe", 1) | {"num_hidden_layers": 4, "mlp_only_layers": [2], "torch_dtype": "float32"}
    directory = write(tmp_path / "model", fields, draw_tensors(fields), shards=2, index=True)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    write_json(directory / "generation_config.json", {"eos_token_id": 0})
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "LICENSE").write_text("free")
    (directory / "pytorch_model.bin").write_bytes(b"not copied")
    return directory


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bytes(
    family: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = draw_fields(family, 2)
    tensors = draw_tensors(fields, stored)
    tensors["model.norm.weight"][:3] = np.nan, np.inf, -np.inf
    write(tmp_path / "a", fields, tensors, shards=3)
    allowed = "--allow-non-finite"
    assert run(to_orbax.main, monkeypatch, "--model", tmp_path / "a", "--output", tmp_path / "b", allowed) == 0
    assert run(to_hf.main, monkeypatch, "--model", tmp_path / "b", "--output", tmp_path / "c", allowed) == 0
    back = load_file(tmp_path / "c" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (back[name].dtype, back[name].tobytes()) == (value.dtype, value.tobytes()), name


@pytest.mark.slow_except(
    "olmoe-slots-bfloat16", "qwen2_moe-switch-float32", "qwen3_moe-slots-float32", "mixtral-slots-bfloat16"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["switch", "slots"])
@pytest.mark.parametrize("family", FAMILIES)
def test_orbax_loads_what_safetensors_load(
    family: str, backend: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = draw_fields(family, 3)
    write(tmp_path / "a", fields, draw_tensors(fields))
    assert run(to_orbax.main, monkeypatch, "--model", tmp_path / "a", "--output", tmp_path / "b") == 0
    config = load_config(tmp_path / "b")
    expected = load_parameters(tmp_path / "a", config, BACKENDS[backend], dtype)
    assert same(load_parameters(tmp_path / "b", config, BACKENDS[backend], dtype), expected)
    assert same(load_parameters(tmp_path / "b", config, BACKENDS[backend], dtype), expected)


def test_each_piece_opens_alone_with_orbax(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import orbax.checkpoint as ocp

    assert run(to_orbax.main, monkeypatch, "--model", model, "--output", tmp_path / "b") == 0
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        piece = checkpointer.restore(tmp_path / "b" / "orbax" / "layers" / "001")
    tensors = draw_tensors(read_json(model / "config.json"))
    gates = [
        tensors[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"].T for e in range(len(piece["experts"]["gate"]))
    ]
    np.testing.assert_array_equal(piece["experts"]["gate"], np.stack(gates))
    np.testing.assert_array_equal(piece["attention"]["q"], tensors["model.layers.1.self_attn.q_proj.weight"])


def test_dtype_is_rounded_once_and_said_in_the_config(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["--output", tmp_path / "b", "--dtype", "bfloat16"]
    assert run(to_orbax.main, monkeypatch, "--model", model, *made) == 0
    assert read_json(tmp_path / "b" / "config.json")["torch_dtype"] == "bfloat16"
    again = ["--model", tmp_path / "b", "--output", tmp_path / "c", "--max-shard-bytes", 8_000]
    assert run(to_hf.main, monkeypatch, *again) == 0
    shards = sorted((tmp_path / "c").glob("*.safetensors"))
    parts = [load_file(file) for file in shards]
    assert len(shards) > 2 and all(sum(value.nbytes for value in part.values()) <= 8_000 for part in parts)
    back = {name: value for part in parts for name, value in part.items()}
    for name, value in draw_tensors(read_json(model / "config.json")).items():
        np.testing.assert_array_equal(back[name], value.astype(DTYPES["bfloat16"]), err_msg=name)


def test_rows_of_different_dtypes_widen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = draw_fields("olmoe", 0)
    tensors = draw_tensors(fields, "bfloat16")
    odd = "model.layers.0.mlp.experts.1.up_proj.weight"
    tensors[odd] = tensors[odd].astype(np.float16)
    write(tmp_path / "a", fields, tensors)
    assert run(to_orbax.main, monkeypatch, "--model", tmp_path / "a", "--output", tmp_path / "b") == 0
    config = read_config(fields)
    loaded = [load_parameters(tmp_path / name, config, BACKENDS["switch"], "float32") for name in "ab"]
    assert same(*loaded)


def test_what_is_beside_the_weights_comes_along(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(to_orbax.main, monkeypatch, "--model", model, "--output", tmp_path / "b") == 0
    beside = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert {file.name for file in (tmp_path / "b").iterdir()} == beside | {"orbax"}
    for name in beside - {"config.json"}:
        assert (tmp_path / "b" / name).read_bytes() == (model / name).read_bytes()
    assert read_json(tmp_path / "b" / "config.json") == read_json(model / "config.json")


# Where a conversion is killed: a statement run before it starts, in the converting process.
KILL = "lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
KILLED = {
    "before the first piece": f"moespec_jax.checkpoint.orbax_io._gather = {KILL}",
    "between two pieces": (
        "gather, left = moespec_jax.checkpoint.orbax_io._gather, [0, 1, 2]; moespec_jax.checkpoint.orbax_io._gather ="
        f" lambda *a: gather(*a) if left and left.pop() else ({KILL})()"
    ),
    "before the manifest": f"moespec_jax.checkpoint.orbax_io.write_json = {KILL}",
    "before the config": f"convert.to_orbax.copy_metadata = {KILL}",
    "before the last rename": f"convert.os = type('os', (), dict(replace={KILL}))",
}


@pytest.mark.slow_except("before the manifest")
@pytest.mark.parametrize("where", KILLED)
def test_a_killed_conversion_leaves_nothing_that_loads(
    where: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, config = tmp_path / "b", load_config(model)
    imports = "import os, signal, convert.to_orbax, moespec_jax.checkpoint.orbax_io"
    script = f"{imports}\n{KILLED[where]}\nconvert.to_orbax.main()"
    arguments = ["--model", str(model), "--output", str(output)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    rest = tmp_path / "b.incomplete"
    assert rest.exists()
    if where == "before the last rename":  # all is written but the name
        load_parameters(rest, load_config(rest), BACKENDS["switch"], "float32")
    else:
        with pytest.raises(CheckpointError):
            load_parameters(rest, load_config(rest), BACKENDS["switch"], "float32")
    assert run(to_orbax.main, monkeypatch, *arguments) == 0
    assert not rest.exists()
    expected = load_parameters(model, config, BACKENDS["switch"], "float32")
    assert same(load_parameters(output, config, BACKENDS["switch"], "float32"), expected)


@pytest.mark.parametrize("script", [to_orbax, to_hf])
def test_an_interrupted_conversion_cleans_up(
    script, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "copy_metadata", interrupt)
    assert run(script.main, monkeypatch, "--model", model, "--output", tmp_path / "b") == 130
    assert capsys.readouterr().err == "error: expected to finish; interrupted, and nothing was kept\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_output_may_be_an_empty_directory_given_as_a_dot(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert run(to_orbax.main, monkeypatch, "--model", model, "--output", ".") == 0
    assert not list((tmp_path / "b").glob(".*")) and load_config(tmp_path / "b") == load_config(model)


def test_outputs_are_never_overwritten(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "b"
    output.mkdir()
    (output / "mine").write_text("x")
    for script in (to_orbax.main, to_hf.main):
        line = refused(script, monkeypatch, capsys, "--model", model, "--output", output)
        assert f"expected an output directory that is new or empty; {output} is neither" in line
    (output / "mine").unlink()
    rest = tmp_path / "b.incomplete"
    rest.mkdir()
    (rest / "theirs").write_text("x")
    line = refused(to_orbax.main, monkeypatch, capsys, "--model", model, "--output", output)
    assert f"expected to write in {rest}; it holds something else" in line and (rest / "theirs").exists()
    shutil.rmtree(rest)
    assert run(to_orbax.main, monkeypatch, "--model", model, "--output", output) == 0


def test_bad_requests_are_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", tmp_path / "b"]
    assert "--model" in refused(to_orbax.main, monkeypatch, capsys, *output)
    assert "int8" in refused(to_orbax.main, monkeypatch, capsys, "--model", model, *output, "--dtype", "int8")
    assert "there is no directory" in refused(to_orbax.main, monkeypatch, capsys, "--model", tmp_path / "no", *output)
    assert "at least 1" in refused(to_hf.main, monkeypatch, capsys, "--model", model, *output, "--max-shard-bytes", 0)
    (tmp_path / "file").write_text("x")
    under = ["--output", tmp_path / "file" / "b"]
    assert "file" in refused(to_orbax.main, monkeypatch, capsys, "--model", model, *under)
    os.truncate(model / "model-00002-of-00002.safetensors", 300)
    line = refused(to_orbax.main, monkeypatch, capsys, "--model", model, *output)
    assert "expected a whole safetensors file" in line
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.incomplete").exists()


def test_values_too_large_for_the_dtype_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = draw_fields("olmoe", 0)
    tensors = draw_tensors(fields, "bfloat16")
    tensors["model.norm.weight"][0] = 1e6
    write(tmp_path / "a", fields, tensors)
    for script in (to_orbax.main, to_hf.main):
        asked = ["--model", tmp_path / "a", "--output", tmp_path / "b", "--dtype", "float16"]
        line = refused(script, monkeypatch, capsys, *asked)
        assert re.search(r"expected values that fit float16; (base/norm|model.norm.weight) \(bfloat16\)", line)
        assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.torch
def test_check_compares_with_transformers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    assert run(to_orbax.main, monkeypatch, "--model", model, "--output", tmp_path / "b") == 0
    asked = ["--model", tmp_path / "b", "--reference", model, "--tokens", 9]
    assert run(check.main, monkeypatch, *asked, "--tolerance", 1e-4) == 0
    assert "largest absolute difference" in capsys.readouterr().out
    assert run(check.main, monkeypatch, *asked, "--tolerance", 0) == 1
    line = refused(check.main, monkeypatch, capsys, "--model", tmp_path / "b", "--tokens", 9)
    assert "expected a directory that transformers loads" in line


def test_check_without_torch_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(check.main, monkeypatch, capsys, "--model", model, "--tokens", 9)
    assert "expected torch and transformers to compare with" in line
