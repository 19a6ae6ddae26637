"""What the TPU compiler makes of our programs, on a machine without a TPU: `pip install "jax[tpu]"`, then

    python -m benchmarks.tpu_compile --out benchmarks/results

compiles one-token decoding and a 512-token prefill chunk ahead of time, for one chip of each generation, at the shapes
of published checkpoints in bfloat16 with a cache of 2048 slots. Nothing runs, so there are no times: sizes, bytes and
copies are the compiler's own.

Bytes per decoded token. The compiler's cost analysis counts the body of a loop once, however often it runs, and our
program is a loop over layers with (under `slots`) a loop over experts in it. So three programs are compiled: the real
one, one whose experts compute nothing, and one without layers. Their counts differ by one expert (under `pallas` by one
kernel call, which counts as its own estimate: all its slots) and by one layer:

    token = outside + layers * (without experts - outside) + layers * k * (real - without experts)

Values that never leave VMEM are in the count too, so it bounds HBM traffic from above. The ideal is every matrix that
the token needs once: the layers without experts, k experts a layer, the output head, one row of the embedding, and the
cache. (A few layers cannot stand for many here: two layers' stacked weights fit VMEM whole and are counted otherwise.)

Large values: see `tpu_hlo.py`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# The host plans for chips it does not have: no metadata server to ask, no lock to take.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding

from benchmarks.tpu_hlo import large_values
from benchmarks.tpu_table import table
from moespec_jax.backend import BACKENDS, Backend
from moespec_jax.cache import empty_cache
from moespec_jax.config import DecoderConfig
from moespec_jax.decode import DecodeState, PrefillState, Settings, decode_steps, prefill_chunk
from moespec_jax.families import read_config
from moespec_jax.parameters import abstract_decoder
from moespec_jax.sample import SamplingConfig

SLOTS, CHUNK, DTYPE = 2048, 512, jnp.bfloat16
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
PROGRAMS = ("decode", "prefill")

MODELS: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
    },
}


class Program(NamedTuple):
    """One program as the compiler left it."""

    bytes_accessed: int
    temp_bytes: int
    alias_bytes: int
    compile_s: float
    hlo: str


class OutOfMemory(Exception):
    """The arguments alone do not fit the chip, which has `available` bytes."""

    def __init__(self, available: int) -> None:
        super().__init__(f"the chip has {available} bytes")
        self.available = available


def main() -> None:
    """Compile what was asked for and write `tpu_compile.json` and the table made of it, or print the JSON."""
    parser = argparse.ArgumentParser(description="Compile our programs for TPUs ahead of time.")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--backends", nargs="+", choices=("slots", "pallas"), default=["slots", "pallas"])
    parser.add_argument("--layers", type=int, help="compile this many layers only")
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        config = read_config(MODELS[model])
        for chip in options.chips:
            for program in options.programs:
                # Prefill runs the same sorted blocks under either back-end.
                for backend in options.backends if program == "decode" else options.backends[:1]:
                    rows.append({"model": model, **examine(config, chip, program, BACKENDS[backend], options.layers)})
                    print(json.dumps(rows[-1]), file=sys.stderr)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    report = {"versions": versions, "slots": SLOTS, "chunk": CHUNK, "dtype": "bfloat16", "rows": rows}
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "tpu_compile.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "tpu_compile.md").write_text(table(report))


def examine(config: DecoderConfig, chip: str, program: str, backend: Backend, layers: int | None) -> dict[str, Any]:
    """One row of the report: the program over `layers` layers (None: all, or as many as fit the chip)."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = SingleDeviceSharding(device)
    needed = memory_needed(config, backend)
    fits = True
    shallow = config if layers is None else with_layers(config, layers)
    try:
        compiled = compile_program(shallow, program, backend, sharding)
    except OutOfMemory as error:
        fits = False
        shallow = with_layers(config, layers_that_fit(config, backend, error.available))
        compiled = compile_program(shallow, program, backend, sharding)
    copies, activations = large_values(compiled.hlo, _copyable_sizes(shallow, backend))
    cache = cache_bytes(shallow)
    row = {
        "chip": chip,
        "program": program,
        "backend": backend.name,
        "fits": fits,
        "needs_gb": round(needed / 1e9, 2),
        "layers": config.num_hidden_layers,
        "layers_compiled": shallow.num_hidden_layers,
        "temp_mb": round(compiled.temp_bytes / 1e6, 2),
        "cache_mb": round(cache / 1e6, 1),
        "cache_aliased": compiled.alias_bytes >= cache,
        "large_copies": copies,
        "large_activations": activations,
        "compile_s": round(compiled.compile_s, 1),
    }
    if program == "decode":
        row |= bytes_per_token(config, shallow, backend, sharding, compiled)
    return row


def bytes_per_token(
    config: DecoderConfig, shallow: DecoderConfig, backend: Backend, sharding: Sharding, real: Program
) -> dict[str, Any]:
    """The compiler's count for a whole decoded token (see the top of this file) beside the ideal."""
    idle = backend._replace(compute=lambda _: lambda experts, layer, x, routing: jnp.zeros(x.shape, jnp.float32))
    without_experts = compile_program(shallow, "decode", idle, sharding).bytes_accessed
    outside = compile_program(with_layers(config, 0), "decode", backend, sharding).bytes_accessed
    counted_slots = config.num_experts_per_tok if backend.name == "pallas" else 1
    expert = (real.bytes_accessed - without_experts) / counted_slots
    layer = without_experts - outside
    total = outside + config.num_hidden_layers * (layer + config.num_experts_per_tok * expert)
    ideal = ideal_bytes(config, backend)
    parts = {"outside": outside, "layer": layer, "expert": expert}
    return {
        "bytes_mb": round(total / 1e6, 1),
        "ideal_mb": round(ideal / 1e6, 1),
        "ratio": round(total / ideal, 3),
        "parts_mb": {name: round(size / 1e6, 2) for name, size in parts.items()},
    }


def ideal_bytes(config: DecoderConfig, backend: Backend) -> int:
    """Bytes that a token cannot do without: its weights once, and the cache."""
    params = abstract_decoder(config, backend, DTYPE)
    head = params.embed if params.lm_head is None else params.lm_head
    chosen = sum(leaf.size // config.num_experts for leaf in jax.tree.leaves(params.experts))
    weights = _size((params.layers, params.norm, head)) + chosen * config.num_experts_per_tok * DTYPE.dtype.itemsize
    return weights + config.hidden_size * DTYPE.dtype.itemsize + cache_bytes(config)


def compile_program(config: DecoderConfig, program: str, backend: Backend, sharding: Sharding) -> Program:
    """Compile for the device of `sharding`, the state donated.

    Raises:
        OutOfMemory: parameters and state exceed the chip's memory.
    """

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    settings = Settings(config, SamplingConfig(), backend.compute(config.hidden_act))
    function, arguments = _PROGRAMS[program]
    params = abstract_decoder(config, backend, DTYPE, sharding)
    lowered = jax.jit(partial(function, settings), donate_argnums=1).lower(params, *placed(arguments(config)))
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        limit = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error))
        if limit is None:
            raise
        raise OutOfMemory(int(float(limit[1]) * 2**30)) from None
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and cost is not None
    counted = int(cost["bytes accessed"])
    return Program(counted, memory.temp_size_in_bytes, memory.alias_size_in_bytes, seconds, compiled.as_text() or "")


def _decode_arguments(config: DecoderConfig) -> tuple[Any, ...]:
    def make() -> tuple[Any, ...]:
        one = jnp.zeros((1,), jnp.int32)
        tokens, stops = jnp.zeros((1, SLOTS), jnp.int32), jnp.zeros((2,), jnp.int32)
        cache = empty_cache(config, 1, SLOTS, DTYPE, stacked=True)
        return DecodeState(tokens, one, one, one > 0, stops, jax.random.key(0), cache), jnp.int32(0)

    return jax.eval_shape(make)


def _chunk_arguments(config: DecoderConfig) -> tuple[Any, ...]:
    def make() -> tuple[Any, ...]:
        cache = empty_cache(config, 1, SLOTS, DTYPE, stacked=True)
        state = PrefillState(cache, jnp.zeros((1, config.hidden_size), DTYPE))
        return state, jnp.zeros((1, CHUNK), jnp.int32), jnp.int32(0), jnp.zeros((1,), jnp.int32)

    return jax.eval_shape(make)


_PROGRAMS = {"decode": (decode_steps, _decode_arguments), "prefill": (prefill_chunk, _chunk_arguments)}


def with_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    """The same decoder cut off after `layers` layers."""
    kept = {"sparse_layers": config.sparse_layers[:layers], "sliding_windows": config.sliding_windows[:layers]}
    return dataclasses.replace(config, num_hidden_layers=layers, **kept)


def memory_needed(config: DecoderConfig, backend: Backend) -> int:
    """Bytes of parameters and cache."""
    return _size(abstract_decoder(config, backend, DTYPE)) + cache_bytes(config)


def layers_that_fit(config: DecoderConfig, backend: Backend, available: int) -> int:
    """How many layers leave a twentieth of the memory to temporaries."""
    outside = memory_needed(with_layers(config, 0), backend)
    layer = memory_needed(with_layers(config, 1), backend) - outside
    return int((0.95 * available - outside) // layer)


def cache_bytes(config: DecoderConfig) -> int:
    """Bytes of keys and values of all layers."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, SLOTS, DTYPE, stacked=True))
    return _size((cache.k, cache.v))


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _copyable_sizes(config: DecoderConfig, backend: Backend) -> set[tuple[str, int]]:
    """Element counts of all weights and cache arrays: whole, one layer of them, one expert of them."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, SLOTS, DTYPE, stacked=True))
    leaves = jax.tree.leaves((abstract_decoder(config, backend, DTYPE), cache.k, cache.v))
    parts = [1, config.num_hidden_layers, config.num_sparse_layers * config.num_experts]
    return {("bf16", leaf.size // part) for leaf in leaves for part in parts}


if __name__ == "__main__":
    main()
