"""Commands in several processes, as on several hosts: the first speaks, and all is as one process would have it."""

import json
from pathlib import Path

import numpy as np
import pytest
from devices import run_processes
from published import same
from safetensors.numpy import load_file
from tiny_pair import write_pair

from moespec_jax.checkpoint.read import load_config, load_parameters
from moespec_jax.nn.backend import BACKENDS


@pytest.mark.slow
def test_generation(tmp_path: Path) -> None:
    """Two processes of one device: each has half of the experts, and the first prints."""
    flags = [*write_pair(tmp_path, 8), "--prompt-ids", "5,17,9", "--json", "--tree-depth", "1", "--tree-top-k", "3"]
    command = ["-m", "moespec_jax.generate", *flags]
    (alone,) = run_processes(command, devices=1)
    traced = tmp_path / "rounds.jsonl"
    first, second = run_processes([*command, "--mesh", "expert=2", "--trace", str(traced)], devices=1, processes=2)
    assert alone.returncode == first.returncode == second.returncode == 0, first.stderr[-2000:] + second.stderr[-2000:]
    here, there = json.loads(alone.stdout), json.loads(first.stdout)
    assert there["prompts"] == here["prompts"] and second.stdout == ""
    assert there["mesh"] == {"data": 1, "expert": 2, "tensor": 1} and here["mesh"] is None
    assert there["experts_max_per_device"] < there["experts_read"]
    assert len(traced.read_text().splitlines()) == there["prompts"][0]["rounds"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_conversion(tmp_path: Path, processes: int) -> None:
    """Layers are shared out; the directory is the same, array by array."""
    target = Path(write_pair(tmp_path, 8)[1])
    command = ["-m", "convert.to_orbax", "--model", str(target), "--output"]
    done = run_processes([*command, str(tmp_path / "many")], devices=1, processes=processes)
    assert [process.returncode for process in done] == [0] * processes, done[0].stderr[-2000:]
    assert done[0].stdout == f"wrote {tmp_path / 'many'}\n" and all(p.stdout == "" for p in done[1:])
    assert [process.returncode for process in run_processes([*command, str(tmp_path / "one")], devices=1)] == [0]
    manifests = [json.loads((tmp_path / name / "orbax" / "manifest.json").read_text()) for name in ("many", "one")]
    assert manifests[0] == manifests[1]
    assert not (tmp_path / "many.incomplete").exists() and not list((tmp_path / "many").glob(".*"))
    config = load_config(target)
    loaded = [load_parameters(tmp_path / name, config, BACKENDS["slots"], "float32") for name in ("many", "one")]
    assert same(*loaded)


@pytest.mark.slow
def test_training_steps(tmp_path: Path) -> None:
    """Two steps over four devices, of one process or of two: the same rows, the same step."""
    target = write_pair(tmp_path, 8)[1]
    data = tmp_path / "data.jsonl"
    rows = [{"prompt_ids": [1, 2], "response_ids": np.arange(3, 40 + n).tolist()} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = "--steps 2 --batch 4 --length 16 --unroll 2 --intermediate-size 24 --draft-vocab-size 100".split()
    flags = ["--model", target, "--data", str(data), "--boundaries", "1,2,3", *sizes, "--learning-rate", "1e-2"]
    command = ["-m", "moespec_jax.train", *flags, "--output"]
    heads = []
    for processes in (1, 2):
        output = tmp_path / f"run{processes}"
        done = run_processes([*command, str(output)], devices=4 // processes, processes=processes)
        assert [process.returncode for process in done] == [0] * processes, done[-1].stderr[-2000:]
        assert done[0].stdout == f"wrote {output / 'head'}\n" and all(p.stdout == "" for p in done[1:])
        assert [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()] == [0, 1]
        heads.append(load_file(output / "head" / "model.safetensors"))
    assert heads[0].keys() == heads[1].keys()
    for name in heads[0]:
        # Gradients are added up in another order; a step of 1e-2 moves weights by about as much.
        np.testing.assert_allclose(*(head[name] for head in heads), rtol=0, atol=1e-5, err_msg=name)


def test_what_one_process_cannot_do_none_does(tmp_path: Path) -> None:
    """The first finds that it cannot, and says why; the others end as well, and say that one did."""
    flags = write_pair(tmp_path, 8)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = ["-m", "convert.to_orbax", "--model", flags[1], "--output", str(tmp_path / "full")]
    first, second = run_processes(command, devices=1, processes=2)
    assert first.returncode == second.returncode == 2
    assert "error: expected an output directory that is new or empty" in first.stderr
    assert "error: expected all processes to go on; another one failed, and says why" in second.stderr
    command = ["-m", "moespec_jax.generate", *flags, "--prompt-ids", "5"]
    for process in run_processes(command, devices=1, processes=2):
        assert process.returncode == 2
        assert "error: expected --mesh with several processes" in process.stderr
