"""Cost of a pass of a target with K of its experts; how often it agrees is in `drafters.json`:

    python -m benchmarks.self_drafting --out benchmarks/results

Random targets of each family (`drafters.py`), float32: the time of the pass that drafts a token over that of the same
pass with all of a token's experts. The passes are compiled alone and take turns; the least of many times counts, since
other work only adds to them. These targets are small, and most of a pass is not its experts.

Published shapes: the bytes that a pass over one token reads with K experts, over those with all of the token's
(`measure/roofline.py`): the least that a drafted token costs where memory bandwidth limits. Nothing of this runs.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.drafters import PAIR, random_targets
from moespec_jax.checkpoint.families import read_config
from moespec_jax.checkpoint.parameters import abstract_decoder
from moespec_jax.decoding.accept import accept_rule
from moespec_jax.decoding.autoregressive import Autoregressive
from moespec_jax.decoding.drafter import SpeculativeParams
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.self_drafter import SelfDrafter
from moespec_jax.decoding.speculative import Speculative
from moespec_jax.measure.published_shapes import MODELS
from moespec_jax.measure.roofline import verification_bytes
from moespec_jax.nn.backend import BACKENDS
from moespec_jax.plan.program import DTYPE
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import device_name, versions
from moespec_jax.runtime.run import Batch, Run


def main() -> int:
    """Measure, and write `self_drafting.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write self_drafting.json to (default: print)")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--busy", action="store_true", help="other programs run beside this one")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "device": device_name(), "cores": os.cpu_count(), "idle": not options.busy, "versions": versions(),
        "repeats": options.repeats, "rows": list(random_rows(options.repeats)), "bytes": list(published_rows()),
    }  # fmt: skip
    text = json.dumps(report, indent=1) + "\n"
    print(text) if options.out is None else (options.out / "self_drafting.json").write_text(text)
    return 0


def random_rows(repeats: int) -> Iterator[dict[str, Any]]:
    """Times of a random target of each family, one row a K."""
    for name, model, prompts in tqdm(random_targets(), unit="family"):
        times, most = pass_times(model, prompts[0], repeats), model.config.num_experts_per_tok
        for experts, seconds in times.items():
            over = round(seconds / times[most], 3)
            yield {"target": name, "experts": experts, "of": most, "us": round(seconds * 1e6, 1), "over_all": over}


def pass_times(model: Model, prompt: list[int], repeats: int) -> dict[int, float]:
    """Least seconds of drafting one token, by the number of experts."""
    plain, accept = Autoregressive(model.config, SamplingConfig(), model.backend), accept_rule(SamplingConfig(), 2)
    params = SpeculativeParams(model.params, ())
    methods = {
        experts: Speculative(plain, SelfDrafter(model.config, model.backend, experts), PAIR, accept)
        for experts in range(1, model.config.num_experts_per_tok + 1)
    }
    # The drafter has no state of its own: all share one.
    state = Run(model.programs, methods[1], params, Batch([prompt], [len(prompt) + 16], (), 0)).state_after(0)
    programs = {experts: jax.jit(method.propose) for experts, method in methods.items()}
    least = dict.fromkeys(programs, float("inf"))
    for turn in range(repeats + 1):
        for experts, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(params, state))
            if turn:  # the first one compiles
                least[experts] = min(least[experts], time.perf_counter() - started)
    return least


def published_rows() -> Iterator[dict[str, Any]]:
    """Bytes of a pass over one token with K experts, over those with all, of published shapes."""
    for name, fields in MODELS.items():
        config = read_config(fields)
        target, most = abstract_decoder(config, BACKENDS["pallas"], DTYPE), config.num_experts_per_tok
        whole = verification_bytes(config, target, most)
        for experts in (1, 2, 4):
            if experts < most:
                part = verification_bytes(config, target, experts) / whole
                yield {"model": name, "experts": experts, "of": most, "over_all": round(part, 3)}


if __name__ == "__main__":
    raise SystemExit(main())
