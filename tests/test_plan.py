"""The sizing command: what it reads from compiled programs, and what it refuses. What it compiles needs the TPU
compiler: `pip install "jax[tpu]"` to run that."""

import importlib.util
import json
from pathlib import Path

import pytest
from devices import run_processes
from tiny import CONFIG

from moespec_jax.measure.collectives import traffic
from moespec_jax.plan.__main__ import main
from moespec_jax.plan.table import table

WITH_COMPILER = importlib.util.find_spec("libtpu") is not None

# As the TPU compiler prints programs, shortened: a loop of unknown length around one of 48 steps and one of 7.
HLO = """HloModule jit_rounds, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%layers_end (p: (s32[], bf16[1,60,2048])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(48), metadata={op_name="while"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.9), direction=LT, metadata={op_name="lt"}
}

%layers (p: (s32[], bf16[1,60,2048])) -> (s32[], bf16[1,60,2048]) {
  %x = bf16[1,60,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %psum.1 = bf16[1,60,2048]{2,1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, to_apply=%add
  %psum.2 = (f32[10]{0}, f32[6]{0}) all-reduce(%x, %x), channel_id=2, to_apply=%add
  ROOT %t = (s32[], bf16[1,60,2048]) tuple(%i, %psum.1)
}

%levels_end (p: (s32[], f32[4])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(7)
  %j = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%j, %constant.3), direction=LT
}

%levels (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = (f32[4000,10]{1,0}, f32[32000,10]{1,0}) all-gather-start(%y), channel_id=3, dimensions={0}
  %h = f32[32000,10]{1,0} all-gather-done(%g)
  ROOT %t.2 = (s32[], f32[4]) tuple(%j, %h)
}

%more (p: (s32[], s32[])) -> pred[] {
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %and.1 = pred[]{:T(512)} and(%a, %b)
}

%round (p: (s32[], s32[])) -> (s32[], s32[]) {
  %w.1 = (s32[], bf16[1,60,2048]) while(%t), condition=%layers_end, body=%layers
  %w.2 = (s32[], f32[4]) while(%t), condition=%levels_end, body=%levels
  ROOT %t.3 = (s32[], s32[]) tuple(%i, %n)
}

ENTRY %main (p: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %w = (s32[], s32[]) while(%p), condition=%more, body=%round
}
"""


def test_collectives_count_as_often_as_loops_run_them() -> None:
    found = traffic(HLO)
    assert found.runs == {"all-reduce": 48 * 2, "all-gather": 7}
    assert found.size == {"all-reduce": 48 * (60 * 2048 * 2 + 16 * 4), "all-gather": 7 * 32000 * 10 * 4}


def test_iterations_that_are_noted_beside_a_loop_are_taken() -> None:
    """Compilers for CPU and GPU hide the comparison in a fusion."""
    fused = HLO.replace(" compare(%i, %constant.9), direction=LT", " fusion(%i, %constant.9), calls=%wrapped_compare")
    assert traffic(fused).runs == {"all-reduce": 2, "all-gather": 7}
    known = 'body=%layers, backend_config={"known_init_step":{"init":"0"},"known_trip_count":{"n":"48"}}'
    assert traffic(fused.replace("body=%layers", known)) == traffic(HLO)


def test_the_table_says_what_does_not_fit() -> None:
    row = {"model": "m", "slice": "v5e-1", "mesh": "data=1,expert=1,tensor=1", "experts": "int8", "fits": False}
    line = table([row | {"weights": 30e9, "cache": 1e9, "available": 16e9}]).splitlines()[-1]
    assert line == "| m | int8 | v5e-1 | 1 x 1 x 1 | **no** | over 31.0 | 16.0 | 30.0 | 1.00 |  |  |"


@pytest.mark.skipif(WITH_COMPILER, reason="the TPU compiler is installed")
def test_without_the_compiler_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "OLMoE-1B-7B"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: expected the TPU compiler, which needs no TPU: pip install libtpu; or, for GPUs, --")
    assert err.count("\n") == 1


@pytest.mark.skipif(not WITH_COMPILER, reason="the TPU compiler is not installed")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--expert-budget", "4"], "expected an expert budget from 8 to 64"),
        (["--mesh", "expert=7"], "expected expert= to divide the model's 64 experts; got 7"),
        (["--mesh", "data=2"], "expected a mesh whose data= divides --batch 1"),
        (["--slices", "v5e-3"], "expected --slices of v5e-1"),
        (["--slices", "v5e-8", "--mesh", "expert=16"], "expected 16 devices"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "OLMoE-1B-7B", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {said}") and err.count("\n") == 1


@pytest.mark.skipif(not WITH_COMPILER, reason="the TPU compiler is not installed")
def test_a_config_of_ones_own_is_planned(tmp_path: Path) -> None:
    """A process of its own, because the compiler stays with the process that loads it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG | {"vocab_size": 1024}))
    flags = ["--model", str(file), "--slices", "v5e-1", "--quantization", "int8", "--tree-size", "4", "--json"]
    (done,) = run_processes(["-m", "moespec_jax.plan", *flags, "--cache-slots", "256"], devices=1)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout)["rows"]
    assert row["fits"] and row["mesh"] == "data=1,expert=1,tensor=1" and row["collectives"] == {}
    assert row["weights"] < row["memory"] < 100e6
