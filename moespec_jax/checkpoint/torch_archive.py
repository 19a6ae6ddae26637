"""A `pytorch_model.bin` read without torch and without running anything: the zip archive that `torch.save` writes since
version 1.6, holding a flat dictionary of tensors.

A pickle is a program for a small stack machine. Here that machine is spelled out with just the instructions a
dictionary of tensors needs: a name in the file is looked up in a closed table of inert values, and nothing is ever
imported or called.
"""

import contextlib
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moespec_jax.errors import CheckpointError

# A head has some twenty tensors, each a few hundred bytes and some fifty instructions here.
_LARGEST_PROGRAM, _LONGEST_PROGRAM = 1 << 22, 1 << 16
_MOST_AXES = 8
_ORDERED_DICT, _REBUILD = object(), object()
_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _ORDERED_DICT,
    "torch._utils _rebuild_tensor_v2": _REBUILD,
    "torch FloatStorage": jnp.dtype("float32"),
    "torch HalfStorage": jnp.dtype("float16"),
    "torch BFloat16Storage": jnp.dtype("bfloat16"),
    "torch LongStorage": jnp.dtype("int64"),
    "torch IntStorage": jnp.dtype("int32"),
    "torch ByteStorage": jnp.dtype("uint8"),
    "torch BoolStorage": jnp.dtype("bool"),
}


class ArchivedTensor(NamedTuple):
    """One tensor of an archive: a strided view of a stored run of elements. `offset` and `stride` count elements."""

    storage: str
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


def read_index(file: Path) -> dict[str, ArchivedTensor]:
    """All tensors of an archive by name; their values stay in the file.

    Raises:
        CheckpointError: it is no such archive, or damaged, or it asks for anything but tensors of known types.
    """
    with _opened(file) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise ValueError(f"it holds {len(programs)} data.pkl in place of one")
        root = programs[0].partition("/")[0]
        if f"{root}/byteorder" in archive.namelist() and _read(archive, file, f"{root}/byteorder", 16) != b"little":
            raise ValueError("its numbers are not little-endian")
        value = interpret(_read(archive, file, programs[0], _LARGEST_PROGRAM))
        if not isinstance(value, dict) or not value or not all(isinstance(v, ArchivedTensor) for v in value.values()):
            raise ValueError("it holds something else than a flat dictionary of tensors")
        return {name: tensor._replace(storage=f"{root}/data/{tensor.storage}") for name, tensor in value.items()}


def read_arrays(
    file: Path, index: Mapping[str, ArchivedTensor], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors of an archive, one at a time, possibly strided.

    Raises:
        CheckpointError: a tensor's values are missing, damaged, or fewer than its shape needs.
    """
    with _opened(file) as archive:
        for name in names:
            tensor = index[name]
            flat = np.frombuffer(_read(archive, file, tensor.storage), np.uint8)
            if flat.size < _extent(tensor) * tensor.dtype.itemsize:
                raise ValueError(f"{name} reaches beyond its stored values")
            start = tensor.offset * tensor.dtype.itemsize
            flat = flat[start : start + (flat.size - start) // tensor.dtype.itemsize * tensor.dtype.itemsize]
            strides = tuple(step * tensor.dtype.itemsize for step in tensor.stride)
            yield name, np.lib.stride_tricks.as_strided(flat.view(tensor.dtype), tensor.shape, strides, writeable=False)


_DAMAGE = (
    *(zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, OverflowError),
    *(LookupError, AttributeError, RuntimeError),  # a stack that is too short, an encrypted entry
)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, with whatever its bytes make any step raise turned into one line."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"expected tensors in a zip archive of torch.save at {file}; {error}") from None


def _read(archive: zipfile.ZipFile, file: Path, name: str, largest: int | None = None) -> bytes:
    """An entry's bytes. Entries lie as they are: nothing may grow on being read."""
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"there is no entry {name}") from None
    bound = file.stat().st_size if largest is None else min(largest, file.stat().st_size)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.file_size > bound:
        raise ValueError(f"its entry {name} of {entry.file_size} bytes is compressed or too large")
    return archive.read(entry)


def interpret(program: bytes) -> Any:
    """The value a pickle builds out of dictionaries, lists, tuples, texts, numbers and tensors.

    Raises:
        ValueError: it uses another instruction, or a name outside the table. A program that does not hold together
            raises other errors as well, IndexError among them; none has any effect.
    """
    machine = _Machine([], [], {})
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if number == _LONGEST_PROGRAM:
            raise ValueError(f"its pickle has more than {_LONGEST_PROGRAM} instructions")
        if opcode.name == "STOP":
            return machine.stack.pop()
        if opcode.name not in _INSTRUCTIONS:
            raise ValueError(f"its pickle uses {opcode.name}, which no dictionary of tensors needs")
        _INSTRUCTIONS[opcode.name](machine, argument)
    raise ValueError("its pickle has no end")


class _Machine(NamedTuple):
    stack: list[Any]
    marks: list[int]
    memo: dict[int, Any]

    def pop(self, count: int) -> list[Any]:
        """The last values, of which there must be that many."""
        if count > len(self.stack):
            raise IndexError("its pickle takes more than it gives")
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_marked(self) -> list[Any]:
        """The values since the last mark."""
        return self.pop(len(self.stack) - self.marks.pop())


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _push_tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _set_items(machine: _Machine, items: list[Any]) -> None:
    # Only texts: hashing a deeply nested key would overflow the interpreter's own stack.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise ValueError("its pickle has a key that is no text")
        machine.stack[-1][key] = value


def _look_up(machine: _Machine, name: str) -> None:
    if name not in _GLOBALS:
        raise ValueError(f"its pickle asks for {name.replace(' ', '.', 1)[:200]}, which is not a tensor's part")
    machine.stack.append(_GLOBALS[name])


def _build(machine: _Machine, _: Any) -> None:
    """A call, of which two are known: an empty dictionary, and a tensor over a storage."""
    function, arguments = machine.pop(2)
    if function is _ORDERED_DICT and arguments == ():
        machine.stack.append({})
    elif function is _REBUILD:
        machine.stack.append(_tensor(*arguments[:4]))
    else:
        raise ValueError("its pickle calls something else than what makes a tensor")


def _storage(machine: _Machine, _: Any) -> None:
    kind, dtype, key, _, size = machine.pop(1)[0]
    texts = kind == "storage" and isinstance(key, str) and isinstance(dtype, np.dtype)
    if not texts or not _is_size(size):
        raise ValueError("its pickle refers to something else than a storage of known type")
    machine.stack.append(_Storage(key, dtype, size))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> ArchivedTensor:
    regular = len(shape) == len(stride) <= _MOST_AXES and all(map(_is_size, (offset, *shape, *stride)))
    if not isinstance(storage, _Storage) or not regular:
        raise ValueError("its pickle has a tensor that is none")
    tensor = ArchivedTensor(storage.key, storage.dtype, tuple(shape), tuple(stride), offset)
    # Strides of 0 make a large tensor out of nothing; those that are saved have all their elements.
    if math.prod(shape) > storage.size or _extent(tensor) > storage.size:
        raise ValueError(f"a tensor {list(shape)} reaches beyond its storage of {storage.size}")
    return tensor


def _extent(tensor: ArchivedTensor) -> int:
    """How many elements of its storage lie up to the last one of a tensor."""
    if 0 in tensor.shape:
        return tensor.offset
    return tensor.offset + 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "EMPTY_TUPLE": _push_tuple(0),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.pop_marked())),
    "SETITEM": lambda machine, _: _set_items(machine, machine.pop(2)),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_marked()),
    "BINPUT": lambda machine, place: machine.memo.update({place: machine.stack[-1]}),
    "LONG_BINPUT": lambda machine, place: machine.memo.update({place: machine.stack[-1]}),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    "BINGET": lambda machine, place: _push(machine, machine.memo[place]),
    "LONG_BINGET": lambda machine, place: _push(machine, machine.memo[place]),
    "GLOBAL": _look_up,
    "STACK_GLOBAL": lambda machine, _: _look_up(machine, " ".join(machine.pop(2))),
    "BINPERSID": _storage,
    "REDUCE": _build,
    # What follows a state dictionary: its version, which says nothing of the tensors.
    "BUILD": lambda machine, _: machine.pop(1),
}
