"""The commands that measure find on a mesh what they find on one device: tokens, texts, counts and divergences."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from devices import results
from tiny import write_tiny

COMMANDS = ("bench", "evaluate", "study", "tune")
# Names of values that are the mesh's own.
_OWN = frozenset({"mesh", "exchanged_mb", "table", "files"})
EIGHT = {"data": 2, "expert": 2, "tensor": 2}


@pytest.fixture
def measured(tmp_path: Path) -> Any:
    """Runs commands on one device and on a mesh, which must find the same; returns what both found."""

    def run(commands: list[str], mesh: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        text = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        command = ["tests/measured_on_meshes.py", str(tmp_path), *commands, "--mesh", text]
        (found,) = results(command, devices=math.prod(mesh.values()))
        assert same(found["one"], found[text]) == []
        return found["one"], found[text]

    return run


@pytest.mark.slow
def test_evaluate_and_bench_find_on_eight_devices_what_one_finds(measured: Any) -> None:
    one, eight = measured(["evaluate", "bench"], EIGHT)
    texts = [row for row in one["evaluate"]["rows"] if row["measured"] == "texts"]
    assert texts[0]["accept_length"] > 1 and texts[1]["kl"] > 1e-4, "nothing accepted or lost shows nothing"
    assert all(row["mesh"] is None for row in one["evaluate"]["rows"] + one["bench"]["rows"])
    assert all(row["mesh"] == EIGHT for row in eight["evaluate"]["rows"] + eight["bench"]["rows"])
    assert all(row["exchanged_mb"] is None for row in one["bench"]["rows"])
    # Of one token of width 32: two sums in each of three layers; the best token of each of four shards, in place of 320
    # logits; and the counts of the measurements.
    plain, least = eight["bench"]["rows"][0], (3 * 2 * 32 + 4 * 2) * 4
    assert least <= plain["exchanged_mb"] * 1e6 <= 1.5 * least
    # Levels of drafts exchange sums and the best tokens of shards. The logits of 40 nodes alone have 51,200 bytes.
    trees = [row for row in eight["bench"]["rows"] if "plain" not in row["setting"]]
    assert len(trees) == 4 and all(40 * least <= row["exchanged_mb"] * 1e6 <= 1.5 * 40 * least for row in trees)
    assert "8 x cpu (cpu) (data 2, expert 2, tensor 2)" in eight["bench"]["table"]
    assert "exchanged, MB a round" in eight["bench"]["table"] and "exchanged" not in one["bench"]["table"]


@pytest.mark.slow
def test_study_and_tune_find_on_four_devices_what_one_finds(measured: Any) -> None:
    mesh = {"data": 2, "tensor": 2}
    one, four = measured(["study", "tune"], mesh)
    assert "4 x cpu (cpu) (data 2, expert 1, tensor 2)" in four["study"]["files"]
    assert one["tune"]["profile"]["tree"] is not None, "plain decoding shows nothing of acceptance"
    assert any(task["task"].startswith("loss of") for task in one["tune"]["tasks"])
    assert four["tune"]["profile"]["mesh"] == mesh | {"expert": 1} and one["tune"]["profile"]["mesh"] is None


@pytest.mark.slow
def test_texts_have_on_four_devices_the_scores_that_one_gives(measured: Any) -> None:
    """Three texts, which two shards of the batch do not divide."""
    one, _ = measured(["scores"], {"data": 2, "tensor": 2})
    direct, verified = ([pair for text in way for part in text for pair in part] for way in one["scores"])
    assert direct != verified and all(log_p < 0 for log_p, _ in direct)


def same(one: Any, here: Any, place: str = "") -> list[str]:
    """Places where results differ: in anything but the last digits of numbers."""
    if isinstance(one, dict) and isinstance(here, dict):
        names = [name for name in {**one, **here} if name not in _OWN]
        return [text for name in names for text in same(one.get(name), here.get(name), f"{place}/{name}")]
    if isinstance(one, list) and isinstance(here, list) and len(one) == len(here):
        return [text for i, pair in enumerate(zip(one, here, strict=True)) for text in same(*pair, f"{place}/{i}")]
    equal = one == pytest.approx(here, rel=2e-4, abs=2e-4) if isinstance(one, float) else one == here
    return [] if equal else [f"{place}: {one} and {here}"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("2x2", "expected a mesh as data=1,expert=4,tensor=2, each at most once; got '2x2'"),
        ("data=64", "expected 64 devices for a mesh of data=64,expert=1,tensor=1"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(
    name: str, mesh: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_tiny(tmp_path / "target", num_experts=8)
    flags = ["--model", str(target), "--output", str(tmp_path / "out"), "--mesh", mesh]
    main = import_module(f"moespec_jax.{name}.__main__").main
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_one_process_measures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"moespec_jax.{name}.__main__").main
    assert main(["--output", str(tmp_path / "out"), "--mesh", "data=1", "--processes", "2"]) == 2
    err = capsys.readouterr().err
    assert err == "error: unrecognized arguments: --processes 2 (see --help)\n"


def test_random_weights_are_made_on_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module("moespec_jax.bench.__main__").main
    assert main(["--random", "toy", "--mesh", "data=1", "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err == "error: expected --mesh with a model; random weights are made on one device\n"
