"""On a mesh of devices, and in several processes, what comes out is what one device gives: token for token, and in all
measurements. Every family on every mesh: `python -m benchmarks.meshes`; here, each family on one."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from devices import results
from families_spread import FAMILIES
from jax.sharding import Mesh
from tiny import write_tiny

from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import RequestError
from moespec_jax.generate import main
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.parallel.mesh import (
    MeshConfig,
    ShardingPlan,
    adopt_mesh,
    best_mesh,
    make_mesh,
    parse_mesh,
    shard_decoder,
)
from moespec_jax.runtime.load import _placement, load

MESHES = {
    "olmoe": ("tensor=8", ["tree"]),
    "qwen3_moe": ("data=2,expert=2,tensor=2", ["plain", "tree", "sampled", "balanced", "menu", "samples"]),
    "qwen2_moe": ("expert=8", ["tree", "global"]),
    "mixtral": ("data=8", ["tree", "global"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MESHES)
def test_a_mesh_of_eight_gives_what_one_device_gives(family: str) -> None:
    mesh, ways = MESHES[family]
    (found,) = results(["tests/spread.py", family, "--mesh", mesh, "--ways", *ways], devices=8)
    # A tree that never gave anything would show nothing of how caches are kept.
    assert all(sum(sequence) > 4 for sequence in found["one/tree"]["accepted"])
    assert found["one/tree"]["tokens"] == found.get("one/plain", found["one/tree"])["tokens"]
    same(found)


@pytest.mark.slow
def test_two_processes_give_what_one_device_gives() -> None:
    command = ["tests/spread.py", "qwen3_moe", "--mesh", "data=2,expert=2,tensor=2", "--ways", "global"]
    first, second = results(command, devices=4, processes=2)
    assert first == second
    same(first)


# Both forms of quantization, which a mesh splits with the experts.
FORMS = [(family, "int8" if number % 2 else "mxfp4") for number, family in enumerate(FAMILIES)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "quantization"), FORMS, ids=["-".join(form) for form in FORMS])
def test_every_family_decodes_on_a_mesh_as_on_one_device(family: str, quantization: str) -> None:
    (found,) = results(["tests/families_spread.py", family, quantization, "data=2,expert=2,tensor=2"], devices=8)
    assert found["mesh"] == found["one"]
    assert len({token for row in found["one"] for token in row[-16:]}) > 5


def same(found: dict[str, Any]) -> None:
    """Every way on every mesh gives what one device gives; the busiest device reads no more than that."""
    for mesh in [name for name in found if not name.startswith("one/")]:
        for way, here in found[mesh].items():
            one = found[f"one/{way}{parse_mesh(mesh).expert if way == 'balanced' else ''}"]
            assert here["tokens"] == one["tokens"], (mesh, way)
            assert here["accepted"] == one["accepted"], (mesh, way)
            budgeted = ("experts_read", "mass_kept", "replaced") if way in ("global", "balanced") else ()
            for name in ("rounds", "experts_wanted", *budgeted):
                assert here[name] == pytest.approx(one[name], abs=2e-4), (mesh, way, name)  # rounded to 1e-4
            np.testing.assert_allclose(here.get("logprobs", 0), one.get("logprobs", 0), atol=1e-4)  # float32
            assert here["experts_max_per_device"] <= one["experts_max_per_device"]
            if way == "balanced":
                budget, shards = 4, parse_mesh(mesh).expert
                assert here["experts_max_per_device"] <= -(-budget // shards)


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("data=2", MeshConfig(2)),
        ("expert=4,tensor=2", MeshConfig(1, 4, 2)),
        (" tensor=3 , data=5", MeshConfig(5, 1, 3)),
    ],
)
def test_meshes_are_read(text: str, mesh: MeshConfig) -> None:
    assert parse_mesh(text) == mesh and parse_mesh(str(mesh)) == mesh


@pytest.mark.parametrize(
    "text", ["", "8", "data=0", "data=-1", "model=2", "data=2,data=2", "expert=1e9", "tensor=99999999"]
)
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a mesh as data=1,expert=4,tensor=2"):
        parse_mesh(text)


def test_all_devices_are_taken_as_suits_the_model(tmp_path: Path) -> None:
    """Here that is one, on which a mesh of one gives what no mesh gives."""
    directory = str(write_tiny(tmp_path))
    spread, plain = load(directory, mesh="auto"), load(directory, backend=BACKENDS["slots"])
    results = [model.generate([[5, 6, 7]], max_new_tokens=4) for model in (spread, plain)]
    assert results[0].mesh == dict(data=1, expert=1, tensor=1) and results[1].mesh is None
    assert results[0].prompts == results[1].prompts


@dataclasses.dataclass(frozen=True)
class Device:
    """In place of a `jax.Device`."""

    id: int
    process_index: int = 0


def devices(*shape: int) -> Any:
    return np.array([Device(i) for i in range(int(np.prod(shape)))]).reshape(shape)


@pytest.mark.parametrize(
    ("axes", "shape", "sizes"),
    [
        (("data", "expert", "tensor"), (1, 4, 2), {"data": 1, "expert": 4, "tensor": 2}),
        (("tensor", "expert"), (2, 4), {"tensor": 2, "expert": 4, "data": 1}),
        (("data",), (3,), {"data": 3, "expert": 1, "tensor": 1}),
        (("pipeline", "expert"), (1, 2), {"expert": 2, "data": 1, "tensor": 1}),
        (("x",), (1,), {"data": 1, "expert": 1, "tensor": 1}),
    ],
)
def test_a_callers_mesh_keeps_its_devices_in_order(
    axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int]
) -> None:
    given = devices(*shape)[::-1]
    found = adopt_mesh(Mesh(given, axes))
    assert dict(found.shape) == sizes and found.devices.flatten().tolist() == given.flatten().tolist()


@pytest.mark.parametrize(
    ("axes", "shape", "given"),
    [
        (("dp", "tp"), (2, 4), "dp=2, tp=4"),
        (("expert", "model"), (4, 2), "expert=4, model=2"),
        (("x",), (8,), "x=8"),
    ],
)
def test_a_mesh_of_other_axes_is_refused(axes: tuple[str, ...], shape: tuple[int, ...], given: str) -> None:
    with pytest.raises(ValueError, match=f"axes among data, expert, tensor, .*; got one of {given}$"):
        adopt_mesh(Mesh(devices(*shape), axes))


def test_a_model_is_loaded_on_a_callers_mesh(tmp_path: Path) -> None:
    directory, device = str(write_tiny(tmp_path)), jax.devices()[:1]
    ours, theirs = (load(directory, mesh=mesh) for mesh in (MeshConfig(), Mesh(device, ("tensor",))))
    assert theirs.programs.mesh is not None and dict(theirs.programs.mesh.shape) == {
        "tensor": 1,
        "data": 1,
        "expert": 1,
    }
    for one, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        assert (one == other).all() and one.sharding.spec == other.sharding.spec
    unchecked = inspect.unwrap(_placement)  # types of arguments, as for a caller
    for wrong in (device, np.array(device), "data=1", Mesh(device, ("x",)).abstract_mesh):
        with pytest.raises(RequestError, match=r'expected mesh as a MeshConfig, a jax\.sharding\.Mesh or "auto"; got'):
            unchecked(ours.config, wrong)


@pytest.mark.slow
def test_some_devices_in_another_order_give_what_one_device_gives() -> None:
    ((one, *others),) = results(["tests/own_mesh.py"], devices=8)
    assert len(others) == 5 and all(tokens == one for tokens in others)


OF_TWO = ["--coordinator", "localhost:1", "--processes", "2", "--process-id"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mesh", "data=64"], "expected 64 devices for a mesh of data=64,expert=1,tensor=1"),
        (["--mesh", "2x2"], "expected a mesh as data=1,expert=4,tensor=2, each at most once; got '2x2'"),
        (
            ["--process-id", "1"],
            "expected --coordinator, --processes and --process-id together; missing: --coordinator, --processes",
        ),
        (
            [*OF_TWO, "2"],
            "expected --coordinator HOST:PORT and a --process-id from 0 to --processes - 1; got process 2",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(write_tiny(tmp_path)), "--prompt-ids", "5,6", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {said}") and err.count("\n") == 1


def config(name: str, **changes: Any) -> DecoderConfig:
    return read_config(MODELS[name] | changes)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected expert= to divide the model's 128 experts; got 3"):
        shard_decoder(config("Qwen3-30B-A3B"), MeshConfig(expert=3))
    with pytest.raises(ValueError, match=r"expected tensor= to divide the model's 32 attention heads.*got 3"):
        shard_decoder(config("Qwen3-30B-A3B"), MeshConfig(tensor=3))
    with pytest.raises(ValueError, match=r"expected 64 devices for a mesh of data=64,expert=1,tensor=1; there"):
        make_mesh(MeshConfig(64))


def test_attention_is_split_over_all_devices_that_share_a_sequence() -> None:
    both = ("expert", "tensor")
    found = shard_decoder(config("Qwen3-30B-A3B"), MeshConfig(2, 4, 2))
    assert found == ShardingPlan(both, both, both, 4, ("tensor",))
    # 24 ways do not divide 32 heads; 3 do not, either, and so the heads stay whole.
    assert shard_decoder(config("Qwen3-30B-A3B", num_experts=24), MeshConfig(expert=3)).heads == ()


@pytest.mark.parametrize(
    ("name", "devices", "mesh"),
    [
        ("Qwen3-30B-A3B", 8, MeshConfig(1, 4, 2)),  # 768 / 4 is not whole lanes
        ("OLMoE-1B-7B", 8, MeshConfig(1, 1, 8)),
        ("Mixtral-8x7B", 16, MeshConfig(1, 1, 16)),
        ("Qwen3-235B-A22B", 32, MeshConfig(1, 8, 4)),
        ("OLMoE-1B-7B", 1, MeshConfig()),
    ],
)
def test_the_mesh_chosen_for_a_model_reads_evenly(name: str, devices: int, mesh: MeshConfig) -> None:
    assert best_mesh(config(name), devices) == mesh
