"""The commands that measure find on a mesh what they find on one device: tokens, texts, counts and divergences."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from devices import results
from tiny import write_tiny

COMMANDS = ("evaluate",)
# Names of values that are seconds, or name the devices.
_OWN = frozenset({"mesh"})


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "mesh"), [(4, "data=2,tensor=2"), (8, "data=2,expert=2,tensor=2")])
def test_a_mesh_measures_what_one_device_measures(devices: int, mesh: str, tmp_path: Path) -> None:
    command = ["tests/measured_on_meshes.py", str(tmp_path), *COMMANDS, "--mesh", mesh]
    (found,) = results(command, devices=devices)
    assert same(found["one"], found[mesh]) == []
    texts = [row for row in found["one"]["evaluate"]["rows"] if row["measured"] == "texts"]
    assert texts[0]["accept_length"] > 1 and texts[1]["kl"] > 1e-4, "nothing accepted or lost shows nothing"
    sizes = dict(data=1, expert=1, tensor=1) | {
        axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))
    }
    assert all(row["mesh"] == sizes for row in found[mesh]["evaluate"]["rows"])


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
    flags = ["--model", str(write_tiny(tmp_path / "target")), "--output", str(tmp_path / "out"), "--mesh", mesh]
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
