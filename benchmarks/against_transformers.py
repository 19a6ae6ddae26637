r"""Plain decoding and prefill against transformers on CPU, same checkpoint, float32, one process, interleaved.

    python -m benchmarks.against_transformers --shape olmoe-4-layers \
        --output benchmarks/results/against_transformers.json

The floor: a one-token step reads every dense weight once and k experts per layer (OLMoE's shape with 4 layers in
float32: 0.68 GB and 0.8 GB); a 512-token prefill reads nearly everything once, and arithmetic decides: 0.28 T
operations.
Needs torch (`pip install torch`), which nothing else in this project does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

import moespec_jax
from moespec_jax.runtime.load import DEMO_TARGET
from moespec_jax.runtime.model import Model

PREFILL_TOKENS = 512
PROMPT_TOKENS = 32


def main() -> None:
    """Measure one shape and add its row to the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["olmoe-4-layers", "demo"], default="demo")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="JSON file whose row of this shape is replaced")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = DEMO_TARGET if arguments.shape == "demo" else str(write_olmoe(Path(scratch), layers=4))
        row = compare(directory, arguments.rounds, arguments.new_tokens)
    print(json.dumps(row, indent=2))
    if arguments.output:
        rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        arguments.output.write_text(json.dumps(rows | {arguments.shape: row}, indent=2) + "\n")


def write_olmoe(directory: Path, layers: int) -> Path:
    """A random checkpoint of OLMoE-1B-7B's shape with fewer layers, bfloat16 on disk."""
    config = transformers.OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=layers, num_experts=64, num_experts_per_tok=8
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="1GB")
    return directory


def compare(directory: str, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Times of both engines, warmed up, in turn; medians, spread, and the median of the per-round ratios."""
    ours = moespec_jax.load(directory, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    short = rng.integers(1, ours.config.vocab_size, PROMPT_TOKENS).tolist()
    long = rng.integers(1, ours.config.vocab_size, PREFILL_TOKENS).tolist()
    cases: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "decode_s_per_token": (
            lambda: our_decode(ours, short, new_tokens),
            lambda: their_decode(theirs, short, new_tokens),
        ),
        "prefill_512_s": (lambda: our_prefill(ours, long), lambda: their_prefill(theirs, long)),
    }
    device = f"CPU, {torch.get_num_threads()} cores"
    row: dict[str, Any] = {"versions": versions(), "device": device, "dtype": "float32"}
    for name, (mine, other) in cases.items():
        mine()
        other()
        pairs = [(rested(mine), rested(other)) for _ in range(rounds)]
        row[name] = {
            "moespec_jax": summary([a for a, _ in pairs]),
            "transformers": summary([b for _, b in pairs]),
            "speedup": summary([b / a for a, b in pairs]),
        }
    return row


def rested(measure: Callable[[], float]) -> float:
    """Measure after a pause: an engine's worker threads spin for a while after their work, at the other's expense."""
    time.sleep(0.5)
    return measure()


def our_decode(model: Model, prompt: list[int], new_tokens: int) -> float:
    """Seconds a token after the first."""
    result = model.generate([prompt], max_new_tokens=new_tokens, ignore_eos=True)
    return result.decode_s / (new_tokens - 1)


def their_decode(model: Any, prompt: list[int], new_tokens: int) -> float:
    """Seconds a token after the first: `generate` of all tokens less `generate` of one."""

    def run(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - started

    return (run(new_tokens) - run(1)) / (new_tokens - 1)


def our_prefill(model: Model, prompt: list[int]) -> float:
    """Seconds until the first token of a long prompt."""
    return model.generate([prompt], max_new_tokens=1, ignore_eos=True).prefill_s


def their_prefill(model: Any, prompt: list[int]) -> float:
    """Seconds of one forward pass with a cache, logits of the last position only."""
    started = time.perf_counter()
    with torch.inference_mode():
        model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "samples": len(values)}


def versions() -> dict[str, str]:
    """Of everything that was timed."""
    return {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
