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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.method import Method
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.decoding.states import Prompts
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.plan.abstract import placed
from moespec_jax.plan.ahead import TOPOLOGIES, compile_lowered, devices, versions
from moespec_jax.runtime.drafters import DEFAULT_TREE
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.programs import Programs
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
        for decoding, (method, params) in methods(model).items():
            for chip in options.chips:
                rows.append({"chip": chip, "dtype": dtype, "decoding": decoding, **examine(method, params, chip)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {"versions": versions(), "backend": BACKEND, "slots": SMALLEST_CACHE, "chunk": CHUNK, "rows": rows}
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "tpu_pair.json").write_text(text)


def methods(model: Model) -> dict[str, tuple[Method[Any, Any, Any], Any]]:
    """Methods as a table calls them, each with its parameters."""

    def drafting(tree: TreeConfig, sampling: SamplingConfig, budget: BudgetConfig | None = None) -> tuple[Any, Any]:
        return model.speculative(model.resolve(DecodingSpec(tree, budget)), sampling), model.speculative_params

    return {
        "plain, greedy": (model.autoregressive(SamplingConfig()), model.params),
        "chain 4/2/1, greedy": drafting(DEFAULT_TREE, SamplingConfig()),
        "tree 60/7/10, top-p, B = 12": drafting(TREE, DRAWN, BudgetConfig(12)),
    }


def examine(method: Method[Any, Any, Any], params: Any, chip: str) -> dict[str, Any]:
    """Seconds and the most temporary memory of a method's programs on one chip."""
    sharding = SingleDeviceSharding(devices(chip)[0])
    seconds, temporary, exact = {}, 0, jax.tree.leaves(params)[0].dtype == jnp.float32
    for name, function, arguments in programs(method, params):
        traced: Any = partial(in_full_precision, function) if exact else function
        program = compile_lowered(Programs().lower(traced, *placed(arguments, sharding), donate=True))
        seconds[name], temporary = round(program.compile_s, 1), max(temporary, program.temp_bytes)
    return {"compile_s": seconds, "temp_mb": round(temporary / 1e6, 2)}


def in_full_precision(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with products of float32 in float32, as `Programs` does where the platform is an accelerator."""
    with jax.default_matmul_precision("highest"):
        return function(*arguments)


def programs(method: Method[Any, Any, Any], params: Any) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Name, function, and arguments without memory behind them, of one sequence's programs; the first argument after
    the parameters is a state, which is donated."""

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    prefill, params = method.prefill, jax.eval_shape(lambda: params)
    empty = jax.eval_shape(lambda params: prefill.init(params, 1, SMALLEST_CACHE), params)
    chunk = ints(1, CHUNK + prefill.lookahead), ints(), ints(1)
    yield "prefill", prefill.read, (params, empty, *chunk)
    read = jax.eval_shape(prefill.read, params, empty, *chunk)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = Prompts(ints(1, SMALLEST_CACHE), ints(1), ints(1), ints(8), key)
    yield "first token", method.begin, (params, read, prompts)
    yield "loop", method.step, (params, jax.eval_shape(method.begin, params, read, prompts), ints())


if __name__ == "__main__":
    main()
