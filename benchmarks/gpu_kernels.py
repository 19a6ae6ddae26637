"""Time of a round by kernel on one GPU:

    python -m benchmarks.gpu_kernels --out benchmarks/results/gpu_kernels.json

profiles plain decoding, and a tree of 60 exactly and under a quarter of the experts, as `gpu.py` runs them: random
weights, SIMULATED acceptance. Rows name a kernel, its launches a round and its microseconds a round, largest first.
Pallas kernels have names (`experts_gate_up`, `attention_parts`...); the others are XLA's. Prefill is profiled apart and
left out. Launches are not captured in CUDA graphs here, so that the profiler sees each; `ms` is the time of a round
without the profiler.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moespec_jax
from benchmarks.gpu import PREFILL, TREES, specs_of
from moespec_jax import BACKENDS, DecodingSpec, Model
from moespec_jax.bench.random_pair import random_model
from moespec_jax.runtime.results import device_name, versions

NEW = 48
# Kernels that are listed one by one; the others are summed.
LISTED = 40


def main() -> int:
    """Profile every spec, and write or print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="OLMoE-1B-7B")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--backend", choices=BACKENDS, default="fused")
    options = parser.parse_args()
    # Read when JAX makes its first device: no CUDA graphs.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    model = random_model(options.model, options.layers, None, BACKENDS[options.backend])
    specs = specs_of(model, TREES[-1:], (4,))
    with ThreadPoolExecutor(8) as pool:  # compiles side by side
        list(pool.map(lambda spec: generate(model, spec, NEW), specs))
    report = {"device": device_name(), "versions": versions(), "model": options.model, "backend": options.backend}
    report |= {"simulated": True, "specs": [profiled(model, spec) for spec in specs]}
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else options.out.write_text(text)
    return 0


def generate(model: Model, spec: DecodingSpec, new_tokens: int) -> moespec_jax.RunResult:
    """Continue one random prompt."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PREFILL)).tolist()
    return model.generate(
        prompt, tree=spec.tree, budget=spec.budget, simulate_accept_length=spec.simulate_accept_length,
        max_new_tokens=new_tokens, ignore_eos=True,
    )  # fmt: skip


def profiled(model: Model, spec: DecodingSpec) -> dict[str, Any]:
    """Kernels of one round: those of a long generation without those of one that stops after the first token."""
    timed = generate(model, spec, NEW)
    begun, (whole, result) = traced(model, spec, 1)[0], traced(model, spec, NEW)
    rounds = result.prompts[0].rounds
    rows = [
        {"kernel": name, "launches": (count - begun[name][0]) / rounds, "us": (us - begun[name][1]) / rounds}
        for name, (count, us) in whole.items()
        if count > begun[name][0]
    ]
    rows.sort(key=lambda row: -row["us"])
    rest = {"kernel": "others", **{key: sum(row[key] for row in rows[LISTED:]) for key in ("launches", "us")}}
    rows = [{k: v if k == "kernel" else round(v, 2) for k, v in row.items()} for row in [*rows[:LISTED], rest]]
    ms = round(timed.decode_s / timed.prompts[0].rounds * 1e3, 3)
    return {"spec": spec.name, "lossy": spec.budget is not None, "rounds": rounds, "ms": ms, "kernels": rows}


def traced(
    model: Model, spec: DecodingSpec, new_tokens: int
) -> tuple[defaultdict[str, tuple[int, float]], moespec_jax.RunResult]:
    """Launches and microseconds of every kernel of one generation, and its result."""
    generate(model, spec, new_tokens)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            result = generate(model, spec, new_tokens)
        (file,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    found: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for plane in data.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                count, us = found[event.name]
                found[event.name] = (count + 1, us + event.duration_ns / 1e3)
    return found, result


if __name__ == "__main__":
    sys.exit(main())
