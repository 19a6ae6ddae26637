"""Mutated draft heads: one line that says what is wrong, or the right values; and of a pickle, nothing is ever run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from draft_heads import (
    DRAFT_VOCAB,
    IDS,
    VOCAB,
    eagle_fields,
    head_tensors,
    same_tree,
    specforge_fields,
    speculators_fields,
    state_dict_program,
    target,
    tensor_program,
    write_archive,
    write_head,
)
from hypothesis import given
from hypothesis import strategies as st
from mutations import bounded_examples, damaged, json_files, outcome, size_of
from safetensors.numpy import save_file

from moespec_jax.checkpoint.head.read import load_draft
from moespec_jax.checkpoint.torch_archive import read_arrays, read_index
from moespec_jax.nn.layers import rope_frequencies

BUFFER = 41 << 20  # what reading tensors takes whatever their size

FORMATS: dict[str, Callable[[], dict[str, Any]]] = {
    "eagle": lambda: eagle_fields(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "specforge": specforge_fields,
    "speculators": speculators_fields,
}


@pytest.mark.parametrize("name", FORMATS)
def test_draft_config(name: str, tmp_path: Path) -> None:
    directory, good = write_head(tmp_path, FORMATS[name](), head_tensors()), FORMATS[name]()
    whole = load_draft(directory, target(), "float32")

    @bounded_examples(50)
    @given(json_files(good))
    def check(data: bytes) -> None:
        (directory / "config.json").write_bytes(data)
        loaded = outcome(lambda: load_draft(directory, target(), "float32"), size_of(directory), BUFFER)
        if loaded is not None:
            assert same_tree(loaded.head, whole.head) or loaded.config.num_attention_heads != 4
            rope_frequencies(loaded.config.rope, loaded.config.head_dim, loaded.config.max_position_embeddings)

    check()


ONE = {"norm.weight": np.arange(12, dtype=np.float32), "d2t": np.arange(3)}
SIZES = st.sampled_from([-1, 0, 1, 2, 3, 4, 12, 13, 2**20, 2**31 - 1, 2**40, 2**62]) | st.integers(-3, 20)


# Of a pickle's machine; among them those that make a lot out of little.
INSTRUCTIONS = [
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"0",
    b"2",
    b"a",
    b"e",
    b"s",
    b"u",
    b"q\x00",
    b"h\x00",
]
INSTRUCTIONS += [
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"N",
    b"Q",
    b"R",
    b"b",
    b"\x81",
    b"\x8a\x01\x05",
    b"K\x07",
    b"\x94",
]
INSTRUCTIONS += [
    b"\x8b\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f",
    b"X\x01\x00\x00\x00a",
    b"c__builtin__\neval\n",
    b"." * 2,
]


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """A damaged pickle, one whose tensor is any view, or one that asks for a name or an instruction of its own."""
    kind = draw(st.sampled_from(["damaged", "view", "global", "program"]))
    if kind == "damaged":
        return draw(damaged(state_dict_program(ONE)))
    if kind == "program":
        return (
            b"\x80\x02"
            + b"".join(draw(st.lists(st.sampled_from(INSTRUCTIONS), max_size=40))) * draw(st.integers(1, 400))
            + b"."
        )
    storage = draw(st.sampled_from(["FloatStorage", "LongStorage", "HalfStorage", "BoolStorage", "DoubleStorage"]))
    axes = draw(st.integers(0, 9))
    sizes, steps = (tuple(draw(st.lists(SIZES, min_size=axes, max_size=axes))) for _ in range(2))
    tensor = tensor_program(
        storage, draw(st.sampled_from(["0", "1", "9", "../0"])), draw(SIZES), draw(SIZES), sizes, steps
    )
    if kind == "global":
        names = [
            "os\nsystem",
            "builtins\neval",
            "torch\nload",
            "torch._utils\n_rebuild_tensor",
            "moespec_jax\nload",
            "\n",
        ]
        tensor = tensor.replace(b"torch\n", draw(st.sampled_from(names)).encode() + b"\n", 1)
    return b"\x80\x02}X\x0b\x00\x00\x00norm.weight" + tensor + b"s."


def test_torch_archive(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    write_archive(file, ONE)
    whole = file.read_bytes()

    def read() -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        index = read_index(file)
        return {name: (index[name].shape, array.copy()) for name, array in read_arrays(file, index, index)}

    @bounded_examples(220)
    @given(st.one_of(programs(), damaged(whole)))
    def check(data: bytes) -> None:
        if data[:2] == b"PK" or len(data) > len(whole) - 60:
            file.write_bytes(data)
        else:
            write_archive(file, ONE, data)
        for shape, array in (outcome(read, file.stat().st_size) or {}).values():
            assert array.shape == shape and array.nbytes <= file.stat().st_size

    check()


@st.composite
def maps(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """The two vocabulary maps with other values, sizes or types, or none."""
    d2t, t2d = (IDS - np.arange(len(IDS))).astype(np.int64), np.isin(np.arange(VOCAB), IDS)
    for _ in range(draw(st.integers(0, 3))):
        d2t[draw(st.integers(0, len(d2t) - 1))] = draw(
            st.sampled_from([-1, 0, 1, 27, 28, 39, 40, 2**31, 2**62, -(2**63)])
        )
        t2d[draw(st.integers(0, VOCAB - 1))] ^= draw(st.booleans())
    kinds = [np.float32, np.uint8, np.int32, np.bool_]
    with np.errstate(all="ignore"):
        d2t = d2t.astype(draw(st.sampled_from([np.int64] * 12 + kinds)))[: draw(st.sampled_from([12] * 9 + [0, 5]))]
        t2d = t2d.astype(draw(st.sampled_from([np.bool_] * 12 + kinds)))[: draw(st.sampled_from([40] * 9 + [0, 39]))]
    found = {"d2t": d2t, "t2d": t2d.reshape(draw(st.sampled_from([(-1,)] * 9 + [(-1, 1)])))}
    return {name: array for name, array in found.items() if draw(st.integers(0, 9))}


def test_vocabulary_maps(tmp_path: Path) -> None:
    """Heads that pass know as many tokens as they have rows, in order, each once."""
    directory, rest = write_head(tmp_path, specforge_fields(), head_tensors()), head_tensors()
    rest = {name: tensor for name, tensor in rest.items() if name not in ("d2t", "t2d")}

    @bounded_examples(80)
    @given(maps())
    def check(found: dict[str, np.ndarray]) -> None:
        save_file(rest | found, directory / "model.safetensors")
        loaded = outcome(lambda: load_draft(directory, target(), "float32"), size_of(directory), BUFFER)
        if loaded is not None:
            ids = np.asarray(loaded.head.target_ids)
            assert ids.shape == (DRAFT_VOCAB,) and ids[0] >= 0 and ids[-1] < VOCAB and np.all(np.diff(ids) > 0)

    check()


@pytest.fixture(autouse=True, scope="module")
def _run_once() -> Iterator[None]:
    """Whatever the first use of a device takes is no input's memory."""
    jax.block_until_ready(jax.device_put(np.zeros(1, np.float32)))
    yield
