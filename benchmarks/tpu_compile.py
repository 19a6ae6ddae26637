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
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from benchmarks.tpu_hlo import copyable_sizes, large_values
from benchmarks.tpu_table import table
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.config import DecoderConfig
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.states import Prompts
from moespec_jax.measure.local_bytes import local_bytes
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.nn.backend import BACKENDS, Backend
from moespec_jax.nn.cache import empty_cache
from moespec_jax.nn.decoder import Decoder
from moespec_jax.plan.abstract import placed, with_layers
from moespec_jax.plan.ahead import DTYPE, SLOTS, TOPOLOGIES, OutOfMemory, Program, compile_lowered, devices, versions
from moespec_jax.runtime.programs import Programs

CHUNK = 512
PROGRAMS = ("decode", "prefill")


def main() -> None:
    """Compile what was asked for and write `tpu_compile.json` and the table made of it, or print the JSON."""
    parser = argparse.ArgumentParser(description="Compile our programs for TPUs ahead of time.")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["OLMoE-1B-7B", "Qwen3-30B-A3B"])
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
    report = {"versions": versions(), "slots": SLOTS, "chunk": CHUNK, "dtype": "bfloat16", "rows": rows}
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "tpu_compile.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "tpu_compile.md").write_text(table(report))


def examine(config: DecoderConfig, chip: str, program: str, backend: Backend, layers: int | None) -> dict[str, Any]:
    """One row of the report: the program over `layers` layers (None: all, or as many as fit the chip)."""
    sharding = SingleDeviceSharding(devices(chip)[0])
    needed = memory_needed(config, backend)
    fits = True
    shallow = config if layers is None else with_layers(config, layers)
    try:
        compiled = compile_program(shallow, program, backend, sharding)
    except OutOfMemory as error:
        fits = False
        shallow = with_layers(config, layers_that_fit(config, backend, error.available))
        compiled = compile_program(shallow, program, backend, sharding)
    copies, activations = large_values(compiled.hlo, weight_sizes(shallow, backend))
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
    ideal = ideal_bytes(config, backend, config.num_experts_per_tok)
    parts = {"outside": outside, "layer": layer, "expert": expert}
    return {
        "bytes_mb": round(total / 1e6, 1),
        "ideal_mb": round(ideal / 1e6, 1),
        "ratio": round(total / ideal, 3),
        "parts_mb": {name: round(size / 1e6, 2) for name, size in parts.items()},
    }


def ideal_bytes(config: DecoderConfig, backend: Backend, experts: int, tokens: int = 1) -> int:
    """Bytes that a pass cannot do without: `experts` of every layer and all other weights once, a row of the embedding
    for each token, and the cache."""
    params = abstract_decoder(config, backend, DTYPE)
    head = params.embed if params.lm_head is None else params.lm_head
    chosen = sum(leaf.size // config.num_experts for leaf in jax.tree.leaves(params.experts))
    weights = local_bytes((params.layers, params.norm, head)) + chosen * experts * DTYPE.dtype.itemsize
    return weights + tokens * config.hidden_size * DTYPE.dtype.itemsize + cache_bytes(config)


def compile_program(config: DecoderConfig, program: str, backend: Backend, sharding: Sharding) -> Program:
    """Compile for the device of `sharding`, the state donated.

    Raises:
        OutOfMemory: parameters and state exceed the chip's memory.
    """
    plain, params = Autoregressive(config, SamplingConfig(), backend), abstract_decoder(config, backend, DTYPE)
    function = plain.step if program == "decode" else plain.prefill.read
    arguments = jax.eval_shape(partial(_ARGUMENTS[program], plain), params)
    params, arguments = placed((params, arguments), sharding)
    return compile_lowered(Programs().lower(function, params, *arguments, donate=True))


def _step_arguments(plain: Autoregressive, params: Decoder) -> tuple[Any, ...]:
    """One sequence under way, and the number of tokens."""
    ids, stop_ids = jnp.zeros((1,), jnp.int32), jnp.zeros((8,), jnp.int32)
    prompts = Prompts(jnp.zeros((1, SLOTS), jnp.int32), ids, ids, stop_ids, jax.random.key(0))
    return plain.begin(params, plain.prefill.init(params, 1, SLOTS), prompts), jnp.int32(0)


def _chunk_arguments(plain: Autoregressive, params: Decoder) -> tuple[Any, ...]:
    """State of a prefill, a chunk of tokens, its position and the prompt's length."""
    tokens, length = jnp.zeros((1, CHUNK), jnp.int32), jnp.zeros((1,), jnp.int32)
    return plain.prefill.init(params, 1, SLOTS), tokens, jnp.int32(0), length


_ARGUMENTS = {"decode": _step_arguments, "prefill": _chunk_arguments}


def memory_needed(config: DecoderConfig, backend: Backend) -> int:
    """Bytes of parameters and cache."""
    return local_bytes(abstract_decoder(config, backend, DTYPE)) + cache_bytes(config)


def layers_that_fit(config: DecoderConfig, backend: Backend, available: int) -> int:
    """How many layers leave a twentieth of the memory to temporaries."""
    outside = memory_needed(with_layers(config, 0), backend)
    layer = memory_needed(with_layers(config, 1), backend) - outside
    return int((0.95 * available - outside) // layer)


def cache_bytes(config: DecoderConfig) -> int:
    """Bytes of keys and values of all layers."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, SLOTS, DTYPE, stacked=True))
    return local_bytes((cache.k, cache.v))


def weight_sizes(config: DecoderConfig, backend: Backend) -> set[tuple[str, int]]:
    """Dtypes and sizes by which a copy of a weight or of the cache is recognized."""
    cache = jax.eval_shape(lambda: empty_cache(config, 1, SLOTS, DTYPE, stacked=True))
    return copyable_sizes(config, (abstract_decoder(config, backend, DTYPE), cache.k, cache.v))


if __name__ == "__main__":
    main()
