"""Peak memory of importing and converting a checkpoint, over the bytes of the parameters it ends in.

    python -m benchmarks.import_memory [--layers 3] [--directory DIR]

The least a process can need is the parameters themselves (factor 1) and the runtime (0.2 GB with JAX). A checkpoint of
OLMoE's tensor shapes with random weights is written shard by shard in bfloat16 and in float32; each is loaded in a
fresh process into each layout of parameters in both dtypes, converted to orbax, loaded from there, and converted back,
which must give the same bytes. Peak is the largest resident set the process ever had; it counts pages of mapped files.
Conversion ends in no parameters: its factor is peak over the bytes on disk. It does not grow with the number of layers:
to orbax it needs three times one layer (0.8 GB in bfloat16), back from it one tensor.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.checkpoint.leaves import Source
from moespec_jax.checkpoint.orbax_io import write_orbax
from moespec_jax.checkpoint.read import load_config, load_parameters, open_safetensors, open_source
from moespec_jax.checkpoint.shards import INDEX
from moespec_jax.checkpoint.tensor_table import tensor_table
from moespec_jax.checkpoint.write import write_config, write_safetensors
from moespec_jax.config import DecoderConfig
from moespec_jax.files import read_json
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.nn.quantization import Quantization

RESULTS = Path(__file__).parent / "results" / "import_memory.json"
TARGET = 1.3


def main() -> None:
    """Run everything, print one line each, and write the results beside this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the temporary directory is made")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(_TASKS[arguments.task.split()[0]](*arguments.task.split()[1:])))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        runs = list(_measure_all(Path(temporary), olmoe(arguments.layers)))
    loads = [run["factor"] for run in runs if run["task"] == "load"]
    result = {
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        "target_load_factor": TARGET,
        "worst_load_factor": max(loads),
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"worst factor of a load {max(loads)}, target {TARGET}")


def olmoe(layers: int) -> DecoderConfig:
    """OLMoE-1B-7B with fewer layers."""
    return DecoderConfig(
        model_type="olmoe",
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        sparse_layers=(True,) * layers,
        sliding_windows=(0,) * layers,
        norm_topk_prob=False,
        rms_norm_eps=1e-5,
        qk_norm="flat",
    )


def random_source(config: DecoderConfig, dtype: str) -> Source:
    """Random tensors made when they are read."""
    table, kind = tensor_table(config), jnp.dtype(dtype)

    def read(names):
        random = np.random.default_rng(0)
        for name in names:
            yield name, random.standard_normal(table[name].shape, np.float32).astype(kind)

    return Source(dict.fromkeys(table, kind), read, table)


def _measure_all(root: Path, config: DecoderConfig):
    for stored in ("bfloat16", "float32"):
        published, converted, back = root / "published", root / "orbax", root / "back"
        published.mkdir()
        write_config(config, published)
        count = sum(int(np.prod(tensor.shape)) for tensor in tensor_table(config).values())
        size = count * jnp.dtype(stored).itemsize
        write_safetensors(random_source(config, stored), published, max_shard_bytes=size // 4)
        shards = len(set(read_json(published / INDEX)["weight_map"].values()))
        about = {"stored": stored, "stored_bytes": size, "shards": shards}
        yield run_task(about, "convert", "to_orbax", published, converted, size=size)
        for source in (published, converted):
            for backend in ("switch", "slots"):
                for dtype in ("float32", "bfloat16"):
                    what = about | {"from": "orbax" if source is converted else "safetensors"}
                    yield run_task(what, "load", backend, dtype, source, size=count * jnp.dtype(dtype).itemsize)
        yield run_task(about, "convert", "to_hf", converted, back, size=size)
        if not same_bytes(config, published, back):
            raise SystemExit("error: expected the same bytes after conversion to orbax and back; they differ")
        for directory in (published, converted, back):
            shutil.rmtree(directory)


def run_task(about: dict[str, Any], task: str, *words: object, size: int) -> dict[str, Any]:
    """Run a task in a fresh process; returns its peak and the factor over `size` bytes, and prints them."""
    line = " ".join([task, *map(str, words)])
    command = [sys.executable, "-m", "benchmarks.import_memory", "--task", line]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(out.splitlines()[-1])
    factor = {"size": size, "factor": round(measured["peak_bytes"] / size, 3)}
    result = about | {"task": task, "how": [str(w) for w in words if not isinstance(w, Path)]} | measured | factor
    print(json.dumps(result), flush=True)
    return result


def _load(backend: str, dtype: str, directory: str, quantization: Quantization | None = None) -> dict[str, Any]:
    path = Path(directory)
    config = load_config(path)
    jax.block_until_ready(jnp.zeros(1))
    before, started = _peak(), time.perf_counter()
    params = load_parameters(path, config, BACKENDS[backend], dtype, quantization=quantization)
    jax.block_until_ready(params)
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "runtime_bytes": before, "peak_bytes": _peak()}


def _convert(direction: str, model: str, output: str) -> dict[str, Any]:
    path, directory = Path(model), Path(output)
    config = load_config(path)
    source = open_source(path, config)
    directory.mkdir()
    before, started = _peak(), time.perf_counter()
    if direction == "to_orbax":
        write_orbax(source, config, directory)
    else:
        write_safetensors(source, directory)
    write_config(config, directory)
    return {"seconds": round(time.perf_counter() - started, 1), "runtime_bytes": before, "peak_bytes": _peak()}


_TASKS = {"load": _load, "convert": _convert}


def same_bytes(config: DecoderConfig, one: Path, other: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    a, b = open_safetensors(one, config), open_safetensors(other, config)
    if a.dtypes != b.dtypes:
        return False
    for name, tensor in a.read(tensor_table(config)):
        _, twin = next(b.read([name]))
        if tensor.tobytes() != twin.tobytes():
            return False
    return True


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the parent held when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
