"""Check and time this library on one GPU, within minutes, and write one results file:

    python -m benchmarks.gpu --reference benchmarks/results/embedded_tokens.json     (on a CPU, once)
    python -m benchmarks.gpu --out benchmarks/results/gpu.json                       (on the GPU)

Correctness: the embedded pair in float32 generates the tokens that a CPU generated with the same settings, plainly and
speculatively, greedy and sampled, exact and under budgets. Sampled texts may part where two draws are near a boundary;
the number of equal tokens before that is reported.

Kernels: `kernels` is the error of each against plain operations in float32 (`gpu_forms.py`), as a share of the largest
value. One that is not right is printed, and the rest goes on.

Speed: OLMoE-1B-7B (or `--model`) with random weights in bfloat16, batch 1, SIMULATED acceptance of published length and
SIMULATED routing skew (`moespec_jax/bench/random_pair.py`): times mean something, texts do not. Columns:

- `ms`: milliseconds a round (plain: a token), median and range over repeats of one run in one process;
- `tokens_per_s`: with the simulated acceptance length, the same for all budgets of a tree;
- `experts_read`: distinct experts a layer;
- `floor_ms`: bytes of the weights that the verification must read (experts read, all else once) over the copy
bandwidth;
- `without`: which kernels were replaced by plain operations, in rows that compare (`all`: every part but the experts);
- `prefill_ms`: prompts of 512 tokens; `prefill` has more lengths.

`copy_gb_per_s` is that of a large copy out of place, bytes read and written.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moespec_jax
from benchmarks.gpu_forms import FORMS, check_forms, on, without
from moespec_jax import BACKENDS, BudgetConfig, DecodingSpec, Model, TreeConfig
from moespec_jax.bench.random_pair import published_accept_length, random_model
from moespec_jax.measure.roofline import verification_bytes
from moespec_jax.runtime.results import device_name, versions

PROMPT = "def quicksort(values):\n"
TREE = TreeConfig()
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(tree=None),
    "chain 4/2/1": {},
    "tree 60/7/10": dict(tree=TREE),
    "tree 60/7/10, B = 12": dict(tree=TREE, budget=BudgetConfig(12)),
    "tree 60/7/10, B = 12, kept weight 1": dict(tree=TREE, budget=BudgetConfig(12, anchor="root", min_kept_weight=1.0)),
    "sampled, plain": dict(tree=None, temperature=0.8, top_p=0.9, seed=5),
    "sampled, chain 4/2/1": dict(temperature=0.8, top_p=0.9, seed=5),
}
TREES = (TreeConfig(2, 1, 4), TreeConfig(4, 4, 16), TREE)
PREFILL, NEW = 512, 96


def main() -> int:
    """Write the reference on a CPU, or check and time on a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--reference", type=Path, help="write the CPU's tokens to this file, and stop")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="OLMoE-1B-7B")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers")
    parser.add_argument("--backends", nargs="+", default=["fused", "triton", "mosaic"])
    parser.add_argument("--full", default="fused", help="back-end that is timed with every tree and budget")
    parser.add_argument(
        "--without", nargs="*", choices=("all", *FORMS), default=["all"],
        help="time --full again without each of these kernels, plainly and with the largest tree",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.reference:
        arguments.reference.write_text(json.dumps(embedded_tokens(), indent=1) + "\n")
        return 0
    report = {"device": device_name(), "versions": versions(), "model": arguments.model, "simulated": True}
    report["embedded"] = check_embedded(Path(__file__).parent / "results" / "embedded_tokens.json")
    report["kernels"] = check_forms()
    report["copy_gb_per_s"] = round(copy_bandwidth() / 1e9, 1)
    report |= {"rows": [], "prefill": []}
    for name in arguments.backends:
        model = random_model(arguments.model, arguments.layers, "bfloat16", BACKENDS[name])
        for kind, rows in _measure(model, name == arguments.full, arguments.repeats, report["copy_gb_per_s"] * 1e9):
            report[kind] += rows
            if arguments.out:  # what is measured so far, should time run out
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        for forms in arguments.without if name == arguments.full else ():
            plainer, few = on(model, without(model.backend, [forms])), [*specs_of(model, TREES[-1:], (4,))]
            rows = timed_rows(plainer, few, arguments.repeats, report["copy_gb_per_s"] * 1e9)
            report["rows"] += [row | {"without": forms} for row in rows]
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        del model
    return 0


def embedded_tokens() -> dict[str, list[int]]:
    """Generate 64 tokens with the embedded pair in every case."""
    model = moespec_jax.load(dtype="float32")

    def tokens(name: str) -> list[int]:
        return model.generate(PROMPT, max_new_tokens=64, **CASES[name]).prompts[0].token_ids

    with ThreadPoolExecutor() as pool:  # compiles side by side
        return dict(zip(CASES, pool.map(tokens, CASES), strict=True))


def check_embedded(reference: Path) -> dict[str, int]:
    """Count the tokens before the first that differs from the CPU's, of 64."""
    expected, found = json.loads(reference.read_text()), embedded_tokens()
    equal = {name: np.cumprod(np.equal(found[name], expected[name])).sum() for name in CASES}
    print({name: int(count) for name, count in equal.items()}, flush=True)
    return {name: int(count) for name, count in equal.items()}


def _measure(model: Model, full: bool, repeats: int, bandwidth: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Time a model with few settings, or with all settings, lengths of prompts, and a batch of 4."""
    few = [*specs_of(model, TREES[:1]), *specs_of(model, TREES[-1:], (4,))[1:]]
    if not full:
        yield "rows", timed_rows(model, few, repeats, bandwidth)
        return
    every = [*specs_of(model, TREES[:-1], (8,)), *specs_of(model, TREES[-1:], (2, 4, 8))[1:]]
    yield "rows", timed_rows(model, every, repeats, bandwidth)
    yield "prefill", [prefill_row(model, length, repeats) for length in (64, 512, 2048)]
    yield "rows", timed_rows(model, few[:2], repeats, bandwidth, batch=4)


def specs_of(model: Model, trees: Sequence[TreeConfig], parts: Sequence[int] = ()) -> list[DecodingSpec]:
    """Plain decoding, and every tree exactly and under budgets of a half, a quarter, ... (`parts`) of the experts."""
    least, budgets = model.config.num_experts_per_tok, [model.config.num_experts // part for part in parts]
    return [DecodingSpec()] + [
        DecodingSpec(tree, None if b is None else BudgetConfig(max(b, least)), published_accept_length(tree))
        for tree in trees
        for b in (None, *budgets)
    ]


def prefill_row(model: Model, length: int, repeats: int) -> dict[str, Any]:
    """Time the prefill of one prompt of `length` tokens, without a head."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length)).tolist()
    results = [model.generate(prompt, tree=None, max_new_tokens=1, ignore_eos=True) for _ in range(repeats + 1)]
    row = {"backend": model.backend.name, "tokens": length, "ms": _spread([r.prefill_s * 1e3 for r in results[1:]])}
    print(json.dumps(row), flush=True)
    return row


def timed_rows(
    model: Model, specs: Sequence[DecodingSpec], repeats: int, bandwidth: float, batch: int = 1
) -> list[dict[str, Any]]:
    """Compile all specs side by side, then time each."""
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, PREFILL)).tolist()

    def run(spec: DecodingSpec) -> moespec_jax.RunResult:
        return model.generate(
            prompts, tree=spec.tree, budget=spec.budget, simulate_accept_length=spec.simulate_accept_length,
            max_new_tokens=NEW, ignore_eos=True,
        )  # fmt: skip

    for spec in specs[:2]:  # prefill of target and head, which the others share
        run(spec)
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(run, specs))
    return [_row(model, spec, [run(spec) for _ in range(repeats)], bandwidth) for spec in specs]


def _row(
    model: Model, spec: DecodingSpec, results: Sequence[moespec_jax.RunResult], bandwidth: float
) -> dict[str, Any]:
    ms = [r.decode_s / r.prompts[0].rounds * 1e3 for r in results]
    last = results[-1]
    floor = verification_bytes(model.config, model.params, last.experts_read) / bandwidth
    row = {
        "backend": model.backend.name,
        "layers": model.config.num_hidden_layers,
        "batch": len(last.prompts),
        "spec": spec.name,
        "lossy": spec.budget is not None,
        "ms": _spread(ms),
        "tokens_per_s": round(statistics.median(r.tokens_per_s for r in results), 1),
        "accept_length": round(last.prompts[0].accept_length, 2),
        "experts_read": round(last.experts_read, 1),
        "floor_ms": round(floor * 1e3, 3),
        "prefill_ms": _spread([r.prefill_s * 1e3 for r in results]),
    }
    print(json.dumps(row), flush=True)
    return row


def copy_bandwidth(gigabytes: int = 2, repeats: int = 10) -> float:
    """Measure the bytes per second, read and written, of large copies out of place. The host waits for the last."""
    array, copy = jnp.ones((gigabytes << 28,), jnp.float32), jax.jit(lambda a: a + 1.0)
    jax.block_until_ready(copy(array))
    started = time.perf_counter()
    jax.block_until_ready([copy(array) for _ in range(repeats)][-1])
    return 2 * array.nbytes * repeats / (time.perf_counter() - started)


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
