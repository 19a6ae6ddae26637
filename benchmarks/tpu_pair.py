"""Whether the embedded pair, which a first run decodes with, compiles for TPUs, and how long that takes, on a machine
without one: `pip install "jax[tpu]"`, then

    python -m benchmarks.tpu_pair --out benchmarks/results

compiles ahead of time all programs that `generate` runs for a short prompt (prefill, first token, loop), for one chip
of each generation: decoding plainly, speculatively with the default chain, and drawing from a tree of 60 under a
budget; in bfloat16, which TPUs default to, and float32. Nothing runs. Seconds are those of the machine that compiled.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig, resolve
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.plan.ahead import TOPOLOGIES, compile_lowered, devices, placed, versions
from moespec_jax.runtime.load import load
from moespec_jax.runtime.method import Method
from moespec_jax.runtime.model import DEFAULT_TREE, Model
from moespec_jax.runtime.run import SMALLEST_CACHE

CHUNK, BACKEND = 16, "pallas"
DRAWN, TREE = SamplingConfig(temperature=0.7, top_p=0.8), TreeConfig(depth=7, top_k=10, size=60)


def main() -> None:
    """Compile for the chips asked for and write `tpu_pair.json`, or print it."""
    parser = argparse.ArgumentParser(description="Compile the embedded pair's programs for TPUs ahead of time.")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="directory to write to")
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes:
        model = load(backend=BACKENDS[BACKEND], dtype=dtype)
        for decoding, method in methods(model).items():
            for chip in options.chips:
                rows.append({"chip": chip, "dtype": dtype, "decoding": decoding, **examine(method, chip)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {"versions": versions(), "backend": BACKEND, "slots": SMALLEST_CACHE, "chunk": CHUNK, "rows": rows}
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "tpu_pair.json").write_text(text)


def methods(model: Model) -> dict[str, Method]:
    """Ways to decode, as a table calls them."""
    budget = resolve(BudgetConfig(12), model.config)
    return {
        "plain, greedy": model.method(SamplingConfig()),
        "chain 4/2/1, greedy": model.method(SamplingConfig(), DEFAULT_TREE),
        "tree 60/7/10, top-p, B = 12": model.method(DRAWN, TREE, budget),
    }


def examine(method: Method, chip: str) -> dict[str, Any]:
    """Seconds and the most temporary memory of a method's programs on one chip."""
    sharding = SingleDeviceSharding(devices(chip)[0])
    seconds, temporary = {}, 0
    # As `Programs` compiles them: float32 is meant where it is asked for.
    exact = jax.tree.leaves(method.params)[0].dtype == jnp.float32
    for name, function, arguments, donated in programs(method):
        with jax.default_matmul_precision("highest" if exact else None):
            jitted = jax.jit(function, donate_argnums=donated)
            program = compile_lowered(jitted.lower(*(placed(argument, sharding) for argument in arguments)))
        seconds[name], temporary = round(program.compile_s, 1), max(temporary, program.temp_bytes)
    return {"compile_s": seconds, "temp_mb": round(temporary / 1e6, 2)}


def programs(method: Method) -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """Name, function, arguments without memory behind them, and donated arguments, of one sequence's programs."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    read = partial(method.read, method.prefill_settings)
    prefill = (
        jax.eval_shape(lambda: method.params),
        jax.eval_shape(lambda: method.empty(1, SMALLEST_CACHE)),
        ints(1, CHUNK + method.lookahead),
        ints(),
        ints(1),
    )
    yield "prefill", read, prefill, (1,)
    begin, key = partial(method.begin, method.settings), jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(read, *prefill)
    first = (prefill[0], *state, ints(1, SMALLEST_CACHE), ints(1), ints(1), ints(8), key)
    yield "first token", begin, first, method.donated
    yield "loop", partial(method.advance, method.settings), (prefill[0], jax.eval_shape(begin, *first), ints()), (1,)


if __name__ == "__main__":
    main()
