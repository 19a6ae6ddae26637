"""Time of a speculative round at published shapes, on whatever device is here: random weights, simulated acceptance.

    python -m benchmarks.real_shapes --model OLMoE-1B-7B --out benchmarks/results     # one GPU or TPU
    python -m benchmarks.real_shapes --model toy                                       # seconds on a CPU

For every tree: a round inside the compiled loop (the time of many rounds over their number, so that the host is in it
once), the same round called alone (what the host and a copy of the caches add), its draft and its verification called
alone likewise, and plain decoding's time a token. Beside them the floor: bytes that the pass must read over the copy
bandwidth measured in the same process.
Nothing here says how many tokens a trained head would gain; the accept length is an argument and marked as simulated.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.shapes import MODELS, draft_config
from benchmarks.speculation import timed
from moespec_jax.accept import accept_rule
from moespec_jax.backend import BACKENDS, default_backend
from moespec_jax.config import DecoderConfig, DraftConfig, TreeConfig
from moespec_jax.decode import Settings
from moespec_jax.families import read_config
from moespec_jax.method import plain_method, speculative_method
from moespec_jax.parameters import random_decoder
from moespec_jax.programs import Programs
from moespec_jax.run import Batch, Run
from moespec_jax.sample import SamplingConfig
from moespec_jax.speculate import SpeculationSettings, Speculator, draft_trees, speculation_rounds, verify_trees
from moespec_jax.train.trainer import random_head

TREES = {"60/7/10": TreeConfig(7, 10, 60), "4/2/1": TreeConfig(2, 1, 4)}
PROMPT, ROUNDS = 128, 32


def main() -> int:
    """Time every tree and write `real_shapes.json`, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "toy"], default="OLMoE-1B-7B")
    parser.add_argument("--layers", type=int, help="so many layers only, where the model does not fit")
    parser.add_argument("--backend", choices=list(BACKENDS), help="default: the platform's")
    parser.add_argument("--accept-length", type=float, default=3.0, help="simulated")
    parser.add_argument("--dtype", default="bfloat16" if jax.default_backend() != "cpu" else "float32")
    parser.add_argument("--out", type=Path, help="directory to write real_shapes.json to (default: print)")
    options = parser.parse_args()
    config, draft = shapes_of(options.model, options.layers)
    backend = BACKENDS[options.backend] if options.backend else default_backend()
    dtype = jnp.dtype(options.dtype)
    target = random_decoder(config, backend, jax.random.key(0), dtype)
    ids = jnp.arange(draft.draft_vocab_size, dtype=jnp.int32)
    head = jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype),
        random_head(draft, target, ids, jax.random.key(1)),
    )
    settings = Settings(config, SamplingConfig(), backend.compute(config.hidden_act))
    params, bandwidth = Speculator(target, head), copy_bandwidth()
    report: dict[str, Any] = {
        "model": options.model, "layers": config.num_hidden_layers, "backend": backend.name, "dtype": str(dtype),
        "device": jax.devices()[0].device_kind, "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "weights": "random",
        "plain_ms_per_token": time_plain(settings, target, dtype), "rows": [],
    }  # fmt: skip
    for name, tree in TREES.items():
        length = min(options.accept_length, float(tree.longest_path))
        accept = accept_rule(SamplingConfig(), tree.longest_path, length)
        speculation = SpeculationSettings(settings, draft, tree, accept)
        report["rows"].append(
            {"tree": name, "simulated_accept_length": length, **time_tree(speculation, params, dtype, bandwidth)}
        )
        print(json.dumps(report["rows"][-1]), file=sys.stderr)
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "real_shapes.json").write_text(text)
    return 0


def shapes_of(model: str, layers: int | None) -> tuple[DecoderConfig, DraftConfig]:
    """Target and head of a published pair, cut to `layers`, or of a toy."""
    published = "OLMoE-1B-7B" if model == "toy" else model
    fields: dict[str, Any] = dict(MODELS[published])
    changes: dict[str, Any] = {}
    if model == "toy":
        small = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, vocab_size=512)
        fields |= small | dict(num_hidden_layers=3, num_experts=8, num_experts_per_tok=2)
        changes = dict(draft_vocab_size=256, intermediate_size=96, boundaries=(0, 1, 2))
    if layers is not None:
        fields["num_hidden_layers"], changes["boundaries"] = layers, (0, layers // 2, layers)
    config = read_config(fields)
    return config, draft_config(published, config, **changes)


def time_tree(settings: SpeculationSettings, params: Speculator, dtype: Any, bandwidth: float) -> dict[str, Any]:
    """Milliseconds of a round and its parts, and the verification's floor."""
    method = speculative_method(settings, params, dtype)
    margin = ROUNDS * settings.tree.longest_path * 4
    run = Run(Programs(), method, Batch([list(range(1, PROMPT + 1))], [PROMPT + margin], (), 0))
    state = run.state_after(2)
    rounds = jax.jit(partial(speculation_rounds, settings))
    many = timed(lambda: rounds(params, state, jnp.int32(ROUNDS)), repeats=5)["median"] / ROUNDS
    one = timed(rounds, params, state, jnp.int32(1))["median"]
    draft = jax.jit(partial(draft_trees, settings))
    trees, _ = draft(params, state)
    verify = timed(jax.jit(partial(verify_trees, settings)), params.target, state, trees)["median"]
    drafting = timed(draft, params, state)["median"]
    wanted = float(rounds(params, state, jnp.int32(1))[1].experts_wanted)
    floor = verification_bytes(settings.target.config, params.target, wanted) / bandwidth * 1e3
    parts = {"round": many, "round_called_alone": one, "draft": drafting, "verify": verify}
    parts["verify_floor"] = floor
    return {
        "ms": {name: round(value, 3) for name, value in parts.items()},
        "experts_wanted_per_layer": round(wanted, 1),
    }


def time_plain(settings: Settings, target: Any, dtype: Any) -> float:
    """Milliseconds a token of plain decoding inside its compiled loop."""
    method = plain_method(settings, target, dtype)
    run = Run(Programs(), method, Batch([list(range(1, PROMPT + 1))], [PROMPT + 4 * ROUNDS], (), 0))
    state = run.state_after(1)
    steps = jax.jit(partial(method.advance, settings))
    return round(timed(lambda: steps(target, state, jnp.int32(ROUNDS)), repeats=5)["median"] / ROUNDS, 3)


def verification_bytes(config: DecoderConfig, target: Any, wanted: float) -> float:
    """Bytes that a verifying pass cannot do without: wanted experts once, and all other weights but the embedding."""

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    others = size(target) - size(target.experts) - (0 if target.lm_head is None else size(target.embed))
    return others + size(target.experts) * wanted / config.num_experts


def copy_bandwidth(megabytes: int = 512) -> float:
    """Bytes a second, read and written, of copying a large array on this device."""
    array = jnp.ones((megabytes << 18,), jnp.float32)
    seconds = timed(jax.jit(lambda a: a + 1.0), array, repeats=10)["min"] / 1e3
    return 2 * array.nbytes / seconds


if __name__ == "__main__":
    sys.exit(main())
