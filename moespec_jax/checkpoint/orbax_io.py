"""Parameters as orbax checkpoints, one for each layer and one for the rest ("parts"). Loading holds one tensor beside
the parameters; writing holds one layer, three times while orbax writes it.

    orbax/base            {"embed", "norm", "lm_head"}
    orbax/layers/007      {"input_norm", "attention": {"q", ...}, "mlp": {"router", ...},
                           "experts": {"gate" [experts, model, ffn], "up", "down" [experts, ffn, model]}}
    orbax/manifest.json   shape and dtype of every array; written last: without it the directory is incomplete

Names and orientation are those of the parameters, independent of the back-end: q, k, v `[out, in]`, other matrices
`[in, out]`. Each part can be opened separately with `orbax.checkpoint`.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from moespec_jax.checkpoint.config_fields import shown
from moespec_jax.checkpoint.dtypes import FLOAT_DTYPES
from moespec_jax.checkpoint.leaves import HostBuffer, Source, cast, copy_into
from moespec_jax.checkpoint.parameters import final_shape
from moespec_jax.checkpoint.tensor_table import Path as TreePath
from moespec_jax.checkpoint.tensor_table import Tensor, check_expert_count, raise_problems, tensor_table
from moespec_jax.config import DecoderConfig
from moespec_jax.errors import CheckpointError
from moespec_jax.files import read_json, write_json
from moespec_jax.parallel.processes import all_or_none, is_first_process

SUBDIRECTORY = "orbax"
MANIFEST = "manifest.json"
FORMAT = "moespec_jax 1"


class StoredLeaf(NamedTuple):
    """One array on disk.

    Fields:
        part: name of its part.
        path: its path in the part.
        shape: its shape.
        tensors: published tensors that it holds.
        stacked: whether they are its rows, in order.
    """

    part: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    stacked: bool

    @property
    def key(self) -> str:
        """Name of the array in the manifest and in messages."""
        return "/".join((self.part, *self.path))


def is_orbax(directory: Path) -> bool:
    """Test whether a directory has parameters as orbax, complete or not."""
    return (directory / SUBDIRECTORY).is_dir()


def open_orbax(directory: Path, config: DecoderConfig) -> Source:
    """Open `directory/orbax`, checked by its manifest.

    Raises:
        CheckpointError: there is no manifest of this format, or it differs from the arrays of `config`: all that are
            unknown, missing, misshapen or of an unsupported dtype, in one message.
    """
    root = directory / SUBDIRECTORY
    found = _read_manifest(root, config)
    table = tensor_table(config)
    leaves = stored_leaves(config, table)
    stored = _check_manifest(root, config, found, leaves)
    dtypes = {name: stored[leaf.key] for leaf in leaves for name in leaf.tensors}

    def read(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        requested = set(names)
        buffer = HostBuffer()
        for leaf in leaves:
            if selected := [name for name in leaf.tensors if name in requested]:
                yield from _read_leaf(root, leaf, stored[leaf.key], selected, buffer)

    return Source(dtypes, read, table)


def write_orbax(
    source: Source, config: DecoderConfig, directory: Path, dtype: DTypeLike | None = None, progress: bool = False
) -> None:
    """Write all tensors to `directory/orbax`, layer by layer. Without a `dtype` each array keeps its own; it is float32
    where those of its rows differ. Several processes divide each layer's experts, and write to the same directory.

    Raises:
        CheckpointError: the source is damaged, or a value does not fit `dtype`.
    """
    import orbax.checkpoint as ocp

    root = (directory / SUBDIRECTORY).absolute()
    root.mkdir(parents=True, exist_ok=jax.process_count() > 1)
    parts: dict[str, list[StoredLeaf]] = {}
    for leaf in stored_leaves(config, source.table):
        parts.setdefault(leaf.part, []).append(leaf)
    # Compression would save a fifth of the disk space, and triple the time of loading.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        for part, leaves in tqdm(
            parts.items(), desc="writing", unit="part", disable=None if progress else True, leave=False
        ):
            with all_or_none():
                arrays = _gather(source, leaves, dtype)
            tree = _nest({leaf.path: _global_array(leaf, arrays[leaf.key]) for leaf in leaves})
            # Experts are read one by one, so each is a chunk.
            chunks = {
                leaf.path: ocp.SaveArgs(chunk_byte_size=arrays[leaf.key][0].nbytes, shard_axes=(0,))
                if leaf.stacked
                else ocp.SaveArgs()
                for leaf in leaves
            }
            checkpointer.save(root / part, args=ocp.args.PyTreeSave(tree, save_args=_nest(chunks)))
    if is_first_process():
        every = [leaf for leaves in parts.values() for leaf in leaves]
        arrays = {leaf.key: {"shape": list(leaf.shape), "dtype": str(_dtype(source, leaf, dtype))} for leaf in every}
        write_json(root / MANIFEST, {"format": FORMAT, "model_type": config.model_type, "arrays": arrays})


def _local_rows(leaf: StoredLeaf) -> slice:
    """Rows of an array that this process reads and writes: all where they do not divide evenly among processes."""
    count, rows = jax.process_count(), leaf.shape[0]
    if not leaf.stacked or rows % count:
        return slice(0, rows)
    return slice(*(number * rows // count for number in (jax.process_index(), jax.process_index() + 1)))


def _global_array(leaf: StoredLeaf, local: np.ndarray) -> np.ndarray | jax.Array:
    """Make one global array of the rows that each process has (its own, or all). With one process, return them."""
    if jax.process_count() == 1:
        return local
    by_process = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([by_process[i] for i in sorted(by_process)]), ("process",))
    sharded = len(local) < leaf.shape[0]
    return jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("process") if sharded else PartitionSpec()), local, leaf.shape
    )


def stored_leaves(config: DecoderConfig, table: Mapping[str, Tensor]) -> list[StoredLeaf]:
    """List the arrays on disk, in order of depth. `table` is the tensor table of `config`."""
    sparse = [i for i, is_sparse in enumerate(config.sparse_layers) if is_sparse]
    leaves: dict[tuple[str, tuple[str, ...]], StoredLeaf] = {}
    for name, tensor in table.items():
        part, path = _place(tensor.path, sparse)
        stacked = tensor.path[0] == "experts"
        shape = (config.num_experts, *final_shape(tensor)) if stacked else final_shape(tensor)
        leaf = leaves.setdefault((part, path), StoredLeaf(part, path, shape, {}, stacked))
        leaf.tensors[name] = tensor
    return list(leaves.values())


def _place(path: TreePath, sparse: list[int]) -> tuple[str, tuple[str, ...]]:
    """Return the part, and the path in it, of a tensor of the table. `sparse` lists sparse layers."""
    names = [str(step) for step in path]
    if path[0] == "experts":
        return f"layers/{sparse[int(path[1])]:03d}", ("experts", names[-1])
    if path[0] == "layers":
        return f"layers/{int(path[1]):03d}", tuple(names[2:])
    return "base", tuple(names)


def _gather(source: Source, leaves: list[StoredLeaf], dtype: DTypeLike | None) -> dict[str, np.ndarray]:
    """Read this process's rows of all arrays of one part. Tensors may be read in any order."""
    arrays: dict[str, np.ndarray] = {}
    writers: dict[str, Callable[[np.ndarray], None]] = {}
    for leaf in leaves:
        local = _local_rows(leaf)
        array = arrays[leaf.key] = np.empty((local.stop - local.start, *leaf.shape[1:]), _dtype(source, leaf, dtype))
        for row, (name, tensor) in enumerate(list(leaf.tensors.items())[local if leaf.stacked else slice(None)]):
            writers[name] = _writer(array[row] if leaf.stacked else array, name, tensor)
    for name, array in source.read(writers):
        writers[name](array)
    return arrays


def _dtype(source: Source, leaf: StoredLeaf, dtype: DTypeLike | None) -> np.dtype:
    """Dtype of an array on disk: `dtype`, else that of its tensors, or float32 where they differ."""
    kinds = {source.dtypes[name] for name in leaf.tensors}
    stored = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    wide = any(tensor.float32 for tensor in leaf.tensors.values())
    return stored if dtype is None else jnp.dtype(jnp.float32 if wide else dtype)


def _writer(out: np.ndarray, name: str, tensor: Tensor) -> Callable[[np.ndarray], None]:
    """Make a function that writes a published array into `out`, in kept orientation and the dtype of `out`."""

    def write(array: np.ndarray) -> None:
        copy_into(out, cast(tensor.reorient(array), out.dtype, name))

    return write


def _nest(arrays: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Convert values by path into nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = array
    return tree


def _read_manifest(root: Path, config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """Read the arrays of a manifest, unchecked but for their number."""
    manifest = read_json(root / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"expected the format {FORMAT!r} in {root / MANIFEST}; got {shown(manifest.get('format'))}"
        )
    found = manifest.get("arrays")
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise CheckpointError(f"expected an object 'arrays' of objects in {root / MANIFEST}")
    shapes = [array.get("shape") for key, array in found.items() if "/experts/" in key]
    rows = [shape[0] for shape in shapes if isinstance(shape, list) and shape and isinstance(shape[0], int)]
    check_expert_count(config, sum(rows), root / MANIFEST)
    return found


def _check_manifest(
    root: Path, config: DecoderConfig, found: dict[str, dict[str, Any]], leaves: list[StoredLeaf]
) -> dict[str, np.dtype]:
    """Compare a manifest with the arrays of `config`; return their dtypes by key."""
    shapes = {leaf.key: list(leaf.shape) for leaf in leaves}
    common = [key for key in shapes if key in found]
    problems = {
        "unknown": [key for key in found if key not in shapes],
        "missing": [key for key in shapes if key not in found],
        "misshapen": [
            f"{key} (expected {shapes[key]}, got {shown(found[key].get('shape'))})"
            for key in common
            if found[key].get("shape") != shapes[key]
        ],
        f"not {', '.join(FLOAT_DTYPES)}": [
            f"{key} ({shown(found[key].get('dtype'))})" for key in common if found[key].get("dtype") not in FLOAT_DTYPES
        ],
    }
    raise_problems(f"the arrays of {config.model_type}", problems, root)
    return {key: jnp.dtype(found[key]["dtype"]) for key in shapes}


def _read_leaf(
    root: Path, leaf: StoredLeaf, dtype: np.dtype, names: list[str], buffer: HostBuffer
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the named tensors of one array, row by row where it is stacked.

    They are read with TensorStore, on which orbax is based: orbax reads whole arrays only, and frees them late.
    """
    import tensorstore

    part = (root / leaf.part).absolute()
    if not part.is_dir():
        raise CheckpointError(f"expected an orbax checkpoint at {part}, as in {MANIFEST}; there is none")
    kvstore = {"driver": "ocdbt", "base": f"file://{part}/", "path": ".".join(leaf.path) + "/"}
    rows = {name: row for row, name in enumerate(leaf.tensors)}
    try:
        store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
        found = f"{store.dtype.name}{list(store.shape)}"
        if found != f"{dtype}{list(leaf.shape)}":
            raise CheckpointError(
                f"expected {leaf.key} as {dtype}{list(leaf.shape)}, as in {MANIFEST}; it is {found} in {part}"
            )
        for name in names:
            stored = store[rows[name]] if leaf.stacked else store
            array = buffer.array(stored.shape, dtype)
            tensorstore.array(array).write(stored).result()
            yield name, leaf.tensors[name].reorient(array)
    except CheckpointError:
        raise
    except Exception as error:  # TensorStore documents no types of exceptions
        raise CheckpointError(f"expected {leaf.key} whole in {part}; {' '.join(str(error).split())[:300]}") from None


@functools.cache
def quiet_orbax() -> None:
    """Suppress orbax's advice to developers, and its log of errors that it also raises, in a command's process."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    previous_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # After a failed write, the pending ones find the event loop closed.
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous_hook(unraisable)

    sys.unraisablehook = hook
