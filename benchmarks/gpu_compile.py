"""Copies of experts in programs of the CUDA compiler, on a machine without a GPU: `pip install "jax[cuda12]"`, then

    python -m benchmarks.gpu_compile --out benchmarks/results

compiles the experts of one MoE layer ahead of time, for GPUs as `plan/cuda.py` describes them, at the shapes of
published checkpoints in bfloat16, and writes `gpu_compile.json`. The layer's index is traced and the weights hold
`LAYERS` layers, as in our programs. Nothing runs, so there are no times.

`slots` is how many experts the program can visit: all that the tokens may select, or a budget of a quarter of them all.
`temp_mb` is the compiler's temporary memory. `copies` lists the values of an expert's size that the program writes to
memory, one for each instruction that writes one: a matrix, gate and up side by side, the matrices of all slots, of a
layer, of all layers. An expert in another type, or multiplied by a token and not yet summed, counts as well: it is
traffic no less. Products do not: what matrix multiplications and kernels write. Empty means that weights are read in
place.

(`tpu_hlo.large_values` does not do here. It looks at values from 4 MB up, and Qwen3's matrices have 3.1; and it
recognizes copies by type and size alone, which a kernel's output for all slots can share with an expert.)

No device also means no autotuning: tile sizes, and Triton against cuBLAS, are the compiler's defaults. Both are chosen
after what to fuse into a matrix multiplication is, so they do not undo a copy.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.tpu_hlo import computations
from moespec_jax.checkpoint.families import read_config
from moespec_jax.config import DecoderConfig
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.nn.experts.layouts import Flat
from moespec_jax.nn.experts.mosaic_gpu import mosaic_experts
from moespec_jax.nn.experts.slots import slot_experts
from moespec_jax.nn.experts.triton_gpu import triton_experts
from moespec_jax.nn.quantization import FORMS, Quantization
from moespec_jax.nn.routing import Routing
from moespec_jax.plan.cuda import GPUS, PLUGINS, described_devices, installed_versions, lowering_for

# An importing program may have imported JAX before.
jax.config.update("jax_platforms", "cpu")

TOKENS, LAYERS, DTYPE = (1, 4, 60), 2, jnp.bfloat16
COMPUTES = {"slots": slot_experts, "mosaic": mosaic_experts, "triton": triton_experts}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
# What names values that are there already or, as `*-start`, ones that `*-done` names again.
_VIEWS = re.compile(r"parameter|get-tuple-element|tuple|while|conditional|call|bitcast|constant|opt-barrier|.*-start")


def main() -> None:
    """Compile what was asked for and write `gpu_compile.json`, or print it."""
    parser = argparse.ArgumentParser(description="Compile one MoE layer's experts for GPUs ahead of time.")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=["sm_80", "sm_90"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["OLMoE-1B-7B", "Qwen3-30B-A3B", "Mixtral-8x7B"])
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    versions = installed_versions()
    check_compiler(versions)
    rows = []
    for model in options.models:
        for gpu in options.gpus:
            rows += [{"model": model, "gpu": gpu, **row} for row in examine(read_config(MODELS[model]), gpu)]
            print(*map(json.dumps, rows[-2:]), sep="\n", file=sys.stderr)
    report = {"versions": versions, "dtype": "bfloat16", "rows": rows}
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "gpu_compile.json").write_text(json.dumps(report, indent=1) + "\n")


def examine(config: DecoderConfig, gpu: str) -> list[dict[str, Any]]:
    """One model's rows for one GPU."""
    rows = []
    # `mosaic` needs wgmma, which Hopper alone has; for other GPUs some compilers end the whole process over it.
    for backend in COMPUTES if gpu == "sm_90" else ("slots", "triton"):
        for tokens in TOKENS:
            every = min(tokens * config.num_experts_per_tok, config.num_experts)
            # One token visits its own experts under any budget.
            budget = every if tokens == 1 else min(every, config.num_experts // 4)
            rows += [row(config, gpu, backend, tokens, slots) for slots in sorted({budget, every})]
    return rows


def row(
    config: DecoderConfig, gpu: str, backend: str, tokens: int, slots: int, stored: Quantization | None = None
) -> dict[str, Any]:
    """Compile one model's experts, in bfloat16 or quantized, for one GPU; returns temporaries and copies."""
    compute = COMPUTES[backend](config.expert_activation)
    with lowering_for(gpu):
        lowered = jax.jit(compute).lower(*_arguments(config, gpu, tokens, slots, stored))
    compiled = lowered.compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    matrix = config.hidden_size * config.moe_intermediate_size
    counts = {1, 2, slots, config.num_experts, LAYERS * config.num_experts}
    return {
        "backend": backend,
        "tokens": tokens,
        "slots": slots,
        "temp_mb": round(memory.temp_size_in_bytes / 1e6, 2),
        "copies": copies(hlo, {count * matrix for count in counts}),
    }


def check_compiler(versions: dict[str, str]) -> None:
    """End the program where no plugin with the CUDA compiler is among the installed `versions`."""
    if not any(plugin in versions for plugin in PLUGINS):
        raise SystemExit('The CUDA compiler is not installed: pip install "jax[cuda12]".')


def _arguments(
    config: DecoderConfig, gpu: str, tokens: int, slots: int, stored: Quantization | None
) -> tuple[Any, ...]:
    """Experts, layer, tokens and routing, as shapes on the GPU."""
    sharding = SingleDeviceSharding(described_devices(gpu)[0])

    def array(*shape: int, dtype: Any = DTYPE) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows, model, ffn = LAYERS * config.num_experts, config.hidden_size, config.moe_intermediate_size

    def matrices(inner: int, outer: int) -> Any:
        if stored is None:
            return array(rows, inner, outer)
        kind, parts, _ = FORMS[stored]
        return kind(*(array(rows, inner // p.inputs if p.inputs else 1, outer, dtype=p.dtype) for p in parts))

    gate, up, down = matrices(model, ffn), matrices(model, ffn), matrices(ffn, model)
    ids, weights = (array(tokens, config.num_experts_per_tok, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    biases = [array(rows, 1, width) for width in (ffn, ffn, model)] if config.expert_bias else [None] * 3
    experts = Flat(gate, up, down, config.num_experts, *biases)
    return experts, array(dtype=jnp.int32), array(tokens, model), Routing(ids, weights, max_distinct=slots)


def copies(hlo: str, sizes: set[int]) -> list[str]:
    """Values of one of the `sizes`, in elements, that an optimized HLO program writes, as `operation dtype[dims]`."""
    bodies = computations(hlo)
    inside = {name for body in bodies.values() for line in body for name in _called(line)}
    outside = [line for name, body in bodies.items() if name not in inside for line in body]
    return sorted(value for line in outside for value in _written(line, bodies, sizes))


def _written(line: str, bodies: dict[str, list[str]], sizes: set[int]) -> list[str]:
    found = _INSTRUCTION.match(line)
    if found is None or _VIEWS.fullmatch(found[2]) or _multiplies(line, bodies):
        return []
    arrays = re.findall(r"(\w+)\[([\d,]+)\]", found[1])
    return [f"{found[2]} {dtype}[{dims}]" for dtype, dims in arrays if math.prod(map(int, dims.split(","))) in sizes]


def _multiplies(line: str, bodies: dict[str, list[str]]) -> bool:
    """Whether the instruction is a matrix multiplication or a kernel, or fuses one, however deep."""
    return re.search(r" (dot|custom-call)\(", line) is not None or any(
        _multiplies(inner, bodies) for name in _called(line) for inner in bodies[name]
    )


def _called(line: str) -> list[str]:
    return re.findall(r" calls=%?([\w.\-]+)", line)


if __name__ == "__main__":
    main()
