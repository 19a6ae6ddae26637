"""A full disk is one line and status 2; nothing half written counts as a result, and nothing old is lost."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from full_disk import full_disk
from hf_models import draw_fields
from published import draw_tensors, write
from test_bench import SWEEP, TOY, fast_toy
from test_convert import refused, run
from tiny_pair import write_pair

from convert import draft, to_hf, to_orbax
from moespec_jax.bench import __main__ as bench
from moespec_jax.checkpoint.head.read import load_draft
from moespec_jax.checkpoint.head.write import export_draft
from moespec_jax.checkpoint.read import load_config
from moespec_jax.cli import round_trace as trace
from moespec_jax.cli.round_trace import tracing
from moespec_jax.errors import RequestError
from moespec_jax.files import write_json, writing
from moespec_jax.measure.ledger import Ledger

ROOT = Path(__file__).parent.parent
FULL = os.strerror(27)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_small_file_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(file, {"a": 1})
    before = tree(tmp_path)
    with full_disk(5), pytest.raises(OSError, match=FULL) as raised:
        write_json(file, {"a": 2})
    assert str(file) in str(raised.value) and tree(tmp_path) == before


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Error writing \"x/0\": Failed to write 5 bytes: File too large [os_error_code='27']",
        "Error while serializing: I/O error: File too large (os error 27)",
    ],
)
def test_other_libraries_errors_are_the_systems(said: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=FULL) as raised, writing(tmp_path / "x"):
        raise ValueError(said)
    assert raised.value.errno == 27 and raised.value.filename == str(tmp_path / "x")
    with pytest.raises(ValueError, match="^other$"), writing(tmp_path / "x"):
        raise ValueError("other")


def test_a_ledger_goes_on_wherever_the_disk_was_full(tmp_path: Path) -> None:
    tasks = {"a": {"x": 1.5}, "ü": "text", "none": None}

    def fill(path: Path) -> None:
        ledger = Ledger(path, {"model": "m"})
        for name, value in tasks.items():
            ledger.put(name, value) if name not in ledger else None

    fill(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for left in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.unlink(missing_ok=True)
        with full_disk(left), pytest.raises(OSError, match="cut.jsonl"):
            fill(path)
        fill(path)
        assert path.read_bytes() == whole, left


@pytest.mark.parametrize("script", [to_orbax, to_hf])
@pytest.mark.parametrize("left", [0, 3_000])
def test_a_conversion_leaves_nothing(
    script, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = draw_fields("olmoe", 0)
    model = write(tmp_path / "model", fields, draw_tensors(fields))
    asked = ["--model", model, "--output", tmp_path / "out"]
    with full_disk(left):
        line = refused(script.main, monkeypatch, capsys, *asked)
    assert line == f"error: expected to read and write files; {FULL}: {tmp_path / 'out'}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert run(script.main, monkeypatch, *asked) == 0


def test_an_older_head_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the weights fit and the config does not."""
    _, target, _, head, *_ = write_pair(tmp_path, 1)
    config, before = load_config(Path(target)), tree(Path(head))
    loaded = load_draft(Path(head), config, None)
    fits = (Path(head) / "model.safetensors").stat().st_size
    for left in (0, fits // 2):
        with full_disk(left), pytest.raises(OSError, match=FULL):
            export_draft(loaded.head, loaded.config, Path(head), target=config, dtype=np.float16)
        assert tree(Path(head)) == before
    with monkeypatch.context() as patch, pytest.raises(OSError, match="config.json"):
        patch.setattr("moespec_jax.checkpoint.head.files.write_json", full)
        export_draft(loaded.head, loaded.config, Path(head), target=config, dtype=np.float16)
    assert tree(Path(head)) == before
    # What a process left that was killed amid such a write, a file of safetensors' own, does not stay.
    (Path(head) / ".draft.incomplete").mkdir()
    (Path(head) / ".draft.incomplete" / ".tmpAbCdEf").touch()
    export_draft(loaded.head, loaded.config, Path(head), target=config, dtype=np.float16)
    assert {path.name for path in Path(head).iterdir()} == {"config.json", "model.safetensors"}
    asked = ["--model", target, "--draft-model", head, "--output", tmp_path / "out", "--format", "specforge"]
    with full_disk(0):
        assert FULL in refused(draft.main, monkeypatch, capsys, *asked)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.incomplete").exists()


def full(path: Path, _: object) -> None:
    raise OSError(27, FULL, str(path))


def test_a_trace_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_write_round", lambda file, number, info: file.write("x" * 100_000))
    path = tmp_path / "trace.jsonl"
    path.write_text("old")
    with full_disk(9), pytest.raises(RequestError, match=f"expected to write a trace to .*trace.jsonl; {FULL}"):
        with tracing(str(path)) as on_round:
            assert on_round is not None
            on_round(0, None)  # pyright: ignore[reportArgumentType]
    assert tree(tmp_path) == {"trace.jsonl": b"old"}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The bench of a toy, whose ledger, tables and pictures are written as those of the study, of evaluate and tune."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as the tests have it")
    model = fast_toy("toy", None, None)
    monkeypatch.setattr(bench, "random_model", lambda *_: model)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)
    return lambda output, *more: bench.main([*TOY, *SWEEP, *more, "--output", str(output)])


@pytest.mark.slow
def test_a_bench_goes_on_with_what_it_had_written(
    toy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toy(tmp_path / "whole") == 0
    sizes = {name: len(data) for name, data in tree(tmp_path / "whole").items()}
    assert max(sizes, key=lambda name: sizes[name]) == "bench.png"
    capsys.readouterr()
    output = tmp_path / "out"
    for left, file in ((0, "turns"), (sizes["turns.jsonl"] // 2, "turns"), (sizes["bench.png"] // 2, "bench.png")):
        with full_disk(left):
            assert toy(output) == 2
        out, err = capsys.readouterr()
        line = err.splitlines()[-1]  # after the bar
        assert out == "" and line.startswith(f"error: expected to read and write files; {FULL}: {output / file}")
    turns = tree(output)["turns.jsonl"]
    assert toy(output) == 0 and tree(output)["turns.jsonl"] == turns
    before = tree(output)
    assert before.keys() == sizes.keys()
    for left in (0, sizes["bench.png"] // 2):
        with full_disk(left):
            assert toy(output) == 2
        assert tree(output) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_standard_output_that_is_full(tmp_path: Path) -> None:
    fields = draw_fields("olmoe", 0)
    model = write(tmp_path / "model", fields, draw_tensors(fields))
    command = [sys.executable, "-m", "convert.to_hf", "--model", str(model), "--output", str(tmp_path / "out")]
    with open("/dev/full", "w") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: expected to read and write files; No space left on device\n"
