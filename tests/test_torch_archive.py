"""A `pytorch_model.bin` is read without torch, bit for bit, and nothing in it is ever run."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from draft_heads import head_tensors, state_dict_program, tensor_program, write_archive

from moespec_jax.checkpoint.torch_archive import read_arrays, read_index
from moespec_jax.errors import CheckpointError

ONE = {"norm.weight": np.arange(4, dtype=np.float32)}


def test_every_type_comes_back_and_views_keep_their_strides(tmp_path: Path) -> None:
    tensors = head_tensors() | {"wide": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    tensors |= {"half": np.ones(3, np.float16), "brain": np.arange(3).astype(ml_dtypes.bfloat16)}
    write_archive(tmp_path / "head.bin", tensors)
    index = read_index(tmp_path / "head.bin")
    assert list(index) == list(tensors)
    for name, array in read_arrays(tmp_path / "head.bin", index, tensors):
        assert array.dtype == tensors[name].dtype
        np.testing.assert_array_equal(array, tensors[name])


def test_an_offset_into_a_shared_storage(tmp_path: Path) -> None:
    program = b"\x80\x02}X\x01\x00\x00\x00a" + tensor_program("FloatStorage", "0", 4, 1, (2,), (2,)) + b"s."
    write_archive(tmp_path / "head.bin", ONE, program)
    index = read_index(tmp_path / "head.bin")
    assert next(read_arrays(tmp_path / "head.bin", index, index))[1].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pythons_own_pickler_makes_of_a_state_dict(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `torch.save` uses it, with stand-ins under torch's names; many tensors, so that memo and numbers grow long."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    exec("def _rebuild_tensor_v2(*arguments): ...", utils.__dict__)
    exec("class FloatStorage: ...", torch.__dict__)
    utils._rebuild_tensor_v2.__module__, torch.FloatStorage.__module__ = "torch._utils", "torch"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Tensor:
        def __init__(self, number: int) -> None:
            self.storage = types.SimpleNamespace(number=number)

        def __reduce__(self) -> tuple[Any, ...]:
            return utils._rebuild_tensor_v2, (self.storage, 0, (2, 2), (2, 1), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, types.SimpleNamespace):
                return "storage", torch.FloatStorage, str(obj.number), "cuda:0", 4 if obj.number else 2**33
            return None

    state = OrderedDict({f"layer.{i}.weight": Tensor(i) for i in range(300)})
    state._metadata = OrderedDict({"": {"version": 1}, "layer": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(state)
    write_archive(tmp_path / "head.bin", {str(i): np.full(4, i, np.float32) for i in range(300)}, buffer.getvalue())
    index = read_index(tmp_path / "head.bin")
    assert list(index) == list(state)
    for name, array in read_arrays(tmp_path / "head.bin", index, index):
        np.testing.assert_array_equal(array, np.full((2, 2), int(name.split(".")[1]), np.float32))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_pickle_is_run(protocol: int, tmp_path: Path) -> None:
    program = pickle.dumps({"norm.weight": Evil(tmp_path / "made")}, protocol)
    write_archive(tmp_path / "head.bin", ONE, program)
    with pytest.raises(CheckpointError, match="its pickle") as caught:
        read_index(tmp_path / "head.bin")
    assert not (tmp_path / "made").exists() and "\n" not in str(caught.value)


def one(kind: str = "FloatStorage", size: int = 4, offset: int = 0, shape: tuple = (4,), stride: tuple = (1,)) -> bytes:
    """A pickle of one tensor `a`."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + tensor_program(kind, "0", size, offset, shape, stride) + b"s."


PROGRAMS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected tensors"),
    "no end": (b"\x80\x02}", "pickle"),
    "nothing": (b"\x80\x02}.", "a flat dictionary"),
    "nested": (b"\x80\x02}X\x01\x00\x00\x00a}s.", "a flat dictionary"),
    "a list": (b"\x80\x02].", "a flat dictionary"),
    "underflow": (b"\x80\x02us.", "expected tensors"),
    "stack": (b"\x80\x02s.", "pops more values than it pushes"),
    "memo": (b"\x80\x02h\x07.", "expected tensors"),
    "deep key": (b"\x80\x02})" + b"\x85" * 60_000 + b"Ns.", "a key that is not a string"),
    "long": (b"\x80\x02" + b"}" * 100_000 + b".", "more than 65536 instructions"),
    "eval": (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "requires builtins.eval"),
    "inst": (b"(X\x01\x00\x00\x001ios\nsystem\n.", "uses INST"),
    "persistent text": (b"\x80\x02Pabc\n.", "uses PERSID"),
    "call of a type": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something other"),
    "other storage": (one("DoubleStorage"), "requires torch.DoubleStorage"),
    "not a storage": (b"\x80\x02(X\x01\x00\x00\x00aNNNNtQ.", "something other than a storage"),
    "short persistent id": (b"\x80\x02)Q.", "expected tensors"),
    "beyond": (one(shape=(5,)), "reaches beyond its storage of 4"),
    "offset beyond": (one(offset=1), "reaches beyond its storage"),
    "stride beyond": (one(shape=(2,), stride=(4,)), "reaches beyond its storage"),
    "out of nothing": (one(shape=(1 << 30, 1 << 30), stride=(0, 0)), "reaches beyond its storage"),
    "negative stride": (one(shape=(2,), stride=(-1,)), "an invalid tensor"),
    "negative offset": (one(offset=-1), "an invalid tensor"),
    "many axes": (one(shape=(1,) * 9, stride=(1,) * 9), "an invalid tensor"),
    "storage too short": (one(size=8, shape=(8,)), "a reaches beyond its stored values"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\xff.", "a flat dictionary"),
    "huge bytes": (b"\x80\x05\x96" + b"\xff" * 8 + b".", "expected tensors"),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_bad_pickle_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    program, message = PROGRAMS[what]
    write_archive(tmp_path / "head.bin", ONE, program)
    with pytest.raises(CheckpointError, match=message) as caught:
        index = read_index(tmp_path / "head.bin")
        list(read_arrays(tmp_path / "head.bin", index, index))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def _damage_values(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(ONE["norm.weight"].tobytes(), b"\x01" * 16))


def _without_values(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("head/data.pkl", state_dict_program(ONE))


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a zip": (lambda f: f.write_bytes(pickle.dumps(1)), "not a zip file"),
    "truncated": (lambda f: os.truncate(f, 200), "not a zip file"),
    "changed": (_damage_values, "CRC"),
    "missing values": (_without_values, "no entry head/data/0"),
    "compressed": (lambda f: write_archive(f, ONE, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (lambda f: write_archive(f, ONE, byteorder="big"), "little-endian"),
    "other zip": (lambda f: zipfile.ZipFile(f, "w").close(), "0 data.pkl"),
    "missing": (lambda f: f.unlink(), "No such file"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_a_bad_archive_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    damage, message = ARCHIVES[what]
    file = tmp_path / "head.bin"
    write_archive(file, ONE)
    damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        list(read_arrays(file, read_index(file), ["norm.weight"]))
    assert "\n" not in str(caught.value)


def test_any_byte_may_be_wrong(tmp_path: Path) -> None:
    """Random damage gives the tensors or one line, never another error."""
    file, random = tmp_path / "head.bin", np.random.default_rng(0)
    program = state_dict_program(ONE)
    for _ in range(300):
        damaged = bytearray(program)
        for place in random.integers(2, len(damaged), 2):
            damaged[place] = random.integers(256)
        write_archive(file, ONE, bytes(damaged))
        try:
            index = read_index(file)
            list(read_arrays(file, index, index))
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.torch
def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    whole = torch.from_numpy(random.normal(size=(6, 4)).astype(np.float32))
    saved = OrderedDict(a=whole, b=whole.T, c=whole[2:4], d=whole.bfloat16(), e=whole.half())
    saved |= {"d2t": torch.arange(4), "t2d": torch.tensor([True, False])}
    torch.save(saved, tmp_path / "head.bin")
    index = read_index(tmp_path / "head.bin")
    for name, array in read_arrays(tmp_path / "head.bin", index, saved):
        tensor = saved[name]
        theirs = tensor.float().numpy() if tensor.dtype in (torch.bfloat16, torch.half) else tensor.numpy()
        np.testing.assert_array_equal(array.astype(theirs.dtype), theirs, err_msg=name)
