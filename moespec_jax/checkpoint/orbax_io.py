"""Orbax in and out: one orbax checkpoint per layer. Loading holds a tensor beside the parameters; writing holds one
layer, three times over while orbax writes it.

    orbax/base            {"embed", "norm", "lm_head"}
    orbax/layers/007      {"input_norm", "attention": {"q", ...}, "mlp": {"router", ...},
                           "experts": {"gate" [experts, model, ffn], "up", "down" [experts, ffn, model]}}
    orbax/manifest.json   shape and dtype of every array; written last, so that without it nothing counts

Names and orientation are those of the parameters, whatever back-end will run them: q, k, v `[out, in]`, other matrices
`[in, out]`. Any piece can be opened alone with `orbax.checkpoint`.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.checkpoint.leaves import HostBuffer, Source, cast, copy_into
from moespec_jax.checkpoint.parameters import final_shape
from moespec_jax.checkpoint.tensor_table import Path as TreePath
from moespec_jax.checkpoint.tensor_table import Tensor, expert_matrices, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.files import listing, read_json, write_json
from moespec_jax.parallel.processes import all_or_none, is_first_process

SUBDIRECTORY = "orbax"
MANIFEST = "manifest.json"
FORMAT = "moespec_jax 1"
_DTYPES = ("float32", "float16", "bfloat16")


class StoredLeaf(NamedTuple):
    """One array on disk: the piece it is in, its path there, and the published tensors it is made of. Where `stacked`,
    they are its rows, in order."""

    piece: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    stacked: bool

    @property
    def key(self) -> str:
        """The leaf's name in the manifest and in messages."""
        return "/".join((self.piece, *self.path))


def is_orbax(directory: Path) -> bool:
    """Whether the directory has its parameters as orbax pieces, whole or not."""
    return (directory / SUBDIRECTORY).is_dir()


def open_orbax(directory: Path, config: DecoderConfig) -> Source:
    """The tensors of `directory/orbax`, checked by the manifest.

    Raises:
        CheckpointError: there is no manifest of ours, or it differs from what `config` needs: every array that is
            unknown, missing, misshapen or of an unsupported dtype, in one message.
    """
    root = directory / SUBDIRECTORY
    found = _read_manifest(root, config)
    leaves = stored_leaves(config)
    stored = _check_manifest(root, config, found, leaves)
    dtypes = {name: stored[leaf.key] for leaf in leaves for name in leaf.tensors}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        wanted = set(names)
        buffer = HostBuffer()
        for leaf in leaves:
            if chosen := [name for name in leaf.tensors if name in wanted]:
                yield from _read_leaf(root, leaf, stored[leaf.key], chosen, buffer)

    return Source(dtypes, read)


def write_orbax(
    source: Source, config: DecoderConfig, directory: Path, dtype: DTypeLike | None = None, progress: bool = False
) -> None:
    """Write all tensors to `directory/orbax`, a layer at a time. Without a `dtype` each array keeps its own, or takes
    float32 where its rows differ. Several processes share each layer's experts, and write to the same directory.

    Raises:
        CheckpointError: the source is damaged, or a value does not fit `dtype`.
    """
    import orbax.checkpoint as ocp

    root = (directory / SUBDIRECTORY).absolute()
    root.mkdir(parents=True, exist_ok=jax.process_count() > 1)
    pieces: dict[str, list[StoredLeaf]] = {}
    for leaf in stored_leaves(config):
        pieces.setdefault(leaf.piece, []).append(leaf)
    # Compression would save a fifth of the disk and take three times as long to load.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        for piece, leaves in tqdm(
            pieces.items(), desc="writing", unit="piece", disable=None if progress else True, leave=False
        ):
            with all_or_none():
                arrays = _gather(source, leaves, dtype)
            tree = _nest({leaf.path: _with_the_others(leaf, arrays[leaf.key]) for leaf in leaves})
            # A chunk per expert, as they are read.
            chunks = {
                leaf.path: ocp.SaveArgs(chunk_byte_size=arrays[leaf.key][0].nbytes, shard_axes=(0,))
                if leaf.stacked
                else ocp.SaveArgs()
                for leaf in leaves
            }
            checkpointer.save(root / piece, args=ocp.args.PyTreeSave(tree, save_args=_nest(chunks)))
    if is_first_process():
        every = [leaf for leaves in pieces.values() for leaf in leaves]
        arrays = {leaf.key: {"shape": list(leaf.shape), "dtype": str(_dtype(source, leaf, dtype))} for leaf in every}
        write_json(root / MANIFEST, {"format": FORMAT, "model_type": config.model_type, "arrays": arrays})


def _own_rows(leaf: StoredLeaf) -> slice:
    """The rows of a stacked array that this of several processes reads and writes: all where they cannot be shared."""
    count, rows = jax.process_count(), leaf.shape[0]
    if not leaf.stacked or rows % count:
        return slice(0, rows)
    return slice(*(number * rows // count for number in (jax.process_index(), jax.process_index() + 1)))


def _with_the_others(leaf: StoredLeaf, own: np.ndarray) -> np.ndarray | jax.Array:
    """The whole array, of which each process has its own rows, or all; with one process, as it is."""
    if jax.process_count() == 1:
        return own
    by_process = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([by_process[i] for i in sorted(by_process)]), ("process",))
    shared = len(own) < leaf.shape[0]
    return jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("process") if shared else PartitionSpec()), own, leaf.shape
    )


def stored_leaves(config: DecoderConfig) -> list[StoredLeaf]:
    """Every array on disk, in order of depth."""
    sparse = [i for i, is_sparse in enumerate(config.sparse_layers) if is_sparse]
    leaves: dict[tuple[str, tuple[str, ...]], StoredLeaf] = {}
    for name, tensor in tensor_table(config).items():
        piece, path = _place(tensor.path, sparse)
        stacked = tensor.path[0] == "experts"
        shape = (config.num_experts, *final_shape(tensor)) if stacked else final_shape(tensor)
        leaf = leaves.setdefault((piece, path), StoredLeaf(piece, path, shape, {}, stacked))
        leaf.tensors[name] = tensor
    return list(leaves.values())


def _place(path: TreePath, sparse: list[int]) -> tuple[str, tuple[str, ...]]:
    """The piece and the path in it of a tensor of the table."""
    names = [str(part) for part in path]
    if path[0] == "experts":
        return f"layers/{sparse[int(path[1])]:03d}", ("experts", names[-1])
    if path[0] == "layers":
        return f"layers/{int(path[1]):03d}", tuple(names[2:])
    return "base", tuple(names)


def _gather(source: Source, leaves: list[StoredLeaf], dtype: DTypeLike | None) -> dict[str, np.ndarray]:
    """All arrays of one piece, filled in whatever order their tensors are read."""
    arrays: dict[str, np.ndarray] = {}
    goal: dict[str, Callable[[np.ndarray], None]] = {}
    for leaf in leaves:
        own = _own_rows(leaf)
        array = arrays[leaf.key] = np.empty((own.stop - own.start, *leaf.shape[1:]), _dtype(source, leaf, dtype))
        for row, (name, tensor) in enumerate(list(leaf.tensors.items())[own if leaf.stacked else slice(None)]):
            goal[name] = _filler(array[row] if leaf.stacked else array, name, tensor.transpose)
    for name, tensor in source.read(goal):
        goal[name](tensor)
    return arrays


def _dtype(source: Source, leaf: StoredLeaf, dtype: DTypeLike | None) -> np.dtype:
    kinds = {source.dtypes[name] for name in leaf.tensors}
    own = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    return own if dtype is None else jnp.dtype(dtype)


def _filler(room: np.ndarray, name: str, transpose: bool) -> Callable[[np.ndarray], None]:
    def fill(tensor: np.ndarray) -> None:
        copy_into(room, cast(tensor.T if transpose else tensor, room.dtype, name))

    return fill


def _nest(arrays: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = array
    return tree


def _read_manifest(root: Path, config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """The arrays of a manifest, which may still be any but are about as many as `config` has."""
    manifest = read_json(root / MANIFEST)
    if manifest.get("format") != FORMAT:
        came = shown(manifest.get("format"))
        raise CheckpointError(f"expected the format {FORMAT!r} in {root / MANIFEST}; came {came}")
    found = manifest.get("arrays")
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise CheckpointError(f"expected an object 'arrays' of objects in {root / MANIFEST}")
    shapes = [array.get("shape") for key, array in found.items() if "/experts/" in key]
    rows = [shape[0] for shape in shapes if isinstance(shape, list) and shape and isinstance(shape[0], int)]
    if (count := expert_matrices(config)) > 1000 + 2 * sum(rows):
        raise CheckpointError(f"expected {count} matrices of experts; came {sum(rows)} in {root / MANIFEST}")
    return found


def _check_manifest(
    root: Path, config: DecoderConfig, found: dict[str, dict[str, Any]], leaves: list[StoredLeaf]
) -> dict[str, np.dtype]:
    wanted = {leaf.key: leaf for leaf in leaves}
    both = [key for key in wanted if key in found]
    problems = {
        "unknown": [key for key in found if key not in wanted],
        "missing": [key for key in wanted if key not in found],
        "misshapen": [
            f"{key} (expected {list(wanted[key].shape)}, came {shown(found[key].get('shape'))})"
            for key in both
            if found[key].get("shape") != list(wanted[key].shape)
        ],
        f"not {', '.join(_DTYPES)}": [
            f"{key} ({shown(found[key].get('dtype'))})" for key in both if found[key].get("dtype") not in _DTYPES
        ],
    }
    lines = [f"{len(keys)} {kind}: {listing(keys)}" for kind, keys in problems.items() if keys]
    if lines:
        raise CheckpointError(f"expected the arrays of {config.model_type}; came {'; '.join(lines)} in {root}")
    return {key: jnp.dtype(found[key]["dtype"]) for key in wanted}


def _read_leaf(
    root: Path, leaf: StoredLeaf, dtype: np.dtype, names: list[str], buffer: HostBuffer
) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors of one array, row by row where it is stacked.

    Read with TensorStore, as orbax does it inside: through orbax, arrays come whole only, and are let go of late.
    """
    import tensorstore

    piece = (root / leaf.piece).absolute()
    if not piece.is_dir():
        raise CheckpointError(f"expected an orbax checkpoint at {piece}, as {MANIFEST} says; there is none")
    kvstore = {"driver": "ocdbt", "base": f"file://{piece}/", "path": ".".join(leaf.path) + "/"}
    rows = {name: row for row, name in enumerate(leaf.tensors)}
    try:
        store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
        found = f"{store.dtype.name}{list(store.shape)}"
        if found != f"{dtype}{list(leaf.shape)}":
            raise CheckpointError(
                f"expected {leaf.key} as {dtype}{list(leaf.shape)}, as {MANIFEST} says; it is {found} in {piece}"
            )
        for name in names:
            part = store[rows[name]] if leaf.stacked else store
            array = buffer.array(part.shape, dtype)
            tensorstore.array(array).write(part).result()
            yield name, _oriented(array, leaf.tensors[name])
    except CheckpointError:
        raise
    except Exception as error:  # TensorStore names no exceptions of its own
        raise CheckpointError(f"expected {leaf.key} whole in {piece}; {' '.join(str(error).split())[:300]}") from None


@functools.cache
def quiet_orbax() -> None:
    """For a command's process: orbax no longer advises its developers, nor says once more what it also raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(told: Any) -> None:
        # After the first write that failed, the others find nobody who waits for them.
        if "Event loop is closed" not in str(told.exc_value):
            before(told)

    sys.unraisablehook = hook


def _oriented(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    return array.T if tensor.transpose else array
