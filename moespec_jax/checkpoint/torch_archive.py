"""Reader of `pytorch_model.bin` without torch and without running code: the zip archive that `torch.save` writes since
version 1.6, with a flat dictionary of tensors.

A pickle is a program for a stack machine. The machine below has only the instructions that a dictionary of tensors
requires. Names in the file are looked up in a fixed table of inert values; nothing is imported or called.
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

# Bounds on bytes and instructions of a pickle. A head has about twenty tensors, of a few hundred bytes and about fifty
# instructions each.
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
    """One tensor of an archive: a strided view of a storage.

    Fields:
        storage: entry of the archive with the elements.
        dtype: of the elements.
        shape: of the tensor.
        stride: of each axis, in elements.
        offset: of the first element, in elements.
    """

    storage: str
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Storage(NamedTuple):
    """One storage: the name of its entry, its dtype, and its number of elements."""

    key: str
    dtype: np.dtype
    size: int


def read_index(file: Path) -> dict[str, ArchivedTensor]:
    """Read the tensors of an archive by name, without their values.

    Raises:
        CheckpointError: it is another kind of file, or damaged, or requires anything but tensors of known types.
    """
    with _opened(file) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise ValueError(f"it holds {len(programs)} data.pkl instead of one")
        root = programs[0].partition("/")[0]
        if f"{root}/byteorder" in archive.namelist() and _read(archive, file, f"{root}/byteorder", 16) != b"little":
            raise ValueError("its numbers are not little-endian")
        value = interpret(_read(archive, file, programs[0], _LARGEST_PROGRAM))
        if not isinstance(value, dict) or not value or not all(isinstance(v, ArchivedTensor) for v in value.values()):
            raise ValueError("it holds something other than a flat dictionary of tensors")
        return {name: tensor._replace(storage=f"{root}/data/{tensor.storage}") for name, tensor in value.items()}


def read_arrays(
    file: Path, index: Mapping[str, ArchivedTensor], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the named tensors of an archive, possibly strided.

    Raises:
        CheckpointError: a tensor's values are missing, damaged, or fewer than its shape requires.
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
    *(LookupError, AttributeError, RuntimeError),  # a stack underflow, an encrypted entry
)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; any error that damaged bytes cause in the block is converted to a `CheckpointError`."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"expected tensors in a zip archive of torch.save at {file}; {error}") from None


def _read(archive: zipfile.ZipFile, file: Path, name: str, largest: int | None = None) -> bytes:
    """Read an entry. Compressed entries are refused, since they could expand to any size."""
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"there is no entry {name}") from None
    bound = file.stat().st_size if largest is None else min(largest, file.stat().st_size)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.file_size > bound:
        raise ValueError(f"its entry {name} of {entry.file_size} bytes is compressed or too large")
    return archive.read(entry)


def interpret(program: bytes) -> Any:
    """Interpret a pickle of dictionaries, lists, tuples, strings, numbers and tensors.

    Raises:
        ValueError: it uses another instruction, or a name outside the table. Malformed programs raise other errors too,
            such as IndexError; none has a side effect.
    """
    machine = _Machine([], [], {})
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if number == _LONGEST_PROGRAM:
            raise ValueError(f"its pickle has more than {_LONGEST_PROGRAM} instructions")
        if opcode.name == "STOP":
            return machine.stack.pop()
        if opcode.name not in _INSTRUCTIONS:
            raise ValueError(f"its pickle uses {opcode.name}, which no dictionary of tensors requires")
        _INSTRUCTIONS[opcode.name](machine, argument)
    raise ValueError("its pickle has no end")


class _Machine(NamedTuple):
    """State of the stack machine: stack, positions of marks in it, and memo."""

    stack: list[Any]
    marks: list[int]
    memo: dict[int, Any]

    def pop(self, count: int) -> list[Any]:
        """Remove and return the last `count` values.

        Raises:
            IndexError: there are fewer.
        """
        if count > len(self.stack):
            raise IndexError("its pickle pops more values than it pushes")
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_marked(self) -> list[Any]:
        """Remove and return the values since the last mark."""
        return self.pop(len(self.stack) - self.marks.pop())


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _push_tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _set_items(machine: _Machine, items: list[Any]) -> None:
    # Keys are strings: the hash of a deeply nested key would overflow the interpreter's stack.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise ValueError("its pickle has a key that is not a string")
        machine.stack[-1][key] = value


def _look_up(machine: _Machine, name: str) -> None:
    if name not in _GLOBALS:
        raise ValueError(f"its pickle requires {name.replace(' ', '.', 1)[:200]}, which is not part of a tensor")
    machine.stack.append(_GLOBALS[name])


def _build(machine: _Machine, _: Any) -> None:
    """Replace one of the two supported calls by its result: an empty dictionary, or a view of a storage."""
    function, arguments = machine.pop(2)
    if function is _ORDERED_DICT and arguments == ():
        machine.stack.append({})
    elif function is _REBUILD:
        machine.stack.append(_tensor(*arguments[:4]))
    else:
        raise ValueError("its pickle calls something other than the constructor of a tensor")


def _storage(machine: _Machine, _: Any) -> None:
    kind, dtype, key, _, size = machine.pop(1)[0]
    known = kind == "storage" and isinstance(key, str) and isinstance(dtype, np.dtype)
    if not known or not _is_size(size):
        raise ValueError("its pickle refers to something other than a storage of known type")
    machine.stack.append(_Storage(key, dtype, size))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> ArchivedTensor:
    valid = len(shape) == len(stride) <= _MOST_AXES and all(map(_is_size, (offset, *shape, *stride)))
    if not isinstance(storage, _Storage) or not valid:
        raise ValueError("its pickle has an invalid tensor")
    tensor = ArchivedTensor(storage.key, storage.dtype, tuple(shape), tuple(stride), offset)
    # Strides of 0 would make a large tensor of few elements; saved tensors have all their elements.
    if math.prod(shape) > storage.size or _extent(tensor) > storage.size:
        raise ValueError(f"a tensor {list(shape)} reaches beyond its storage of {storage.size}")
    return tensor


def _extent(tensor: ArchivedTensor) -> int:
    """Number of elements of the storage up to the last one of a tensor."""
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
    # The metadata that follows a state dictionary: versions, which do not affect tensors.
    "BUILD": lambda machine, _: machine.pop(1),
}
