"""What int8 experts do to the embedded target's distribution:

    python -m benchmarks.int8_quality --out benchmarks/results

runs pieces of held-out modules through the model in float32 and with int8 experts, and compares every next token's
distribution: divergence KL(float32 || int8) in nats, the share of positions with the same first choice, and both
perplexities. Means over positions; intervals are 95 % of a bootstrap over texts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moespec_jax.cli.command import use_compilation_cache
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.measure.fidelity import interval
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.measure.teacher_forcing import log_probabilities
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import versions

BATCH = 8


def main() -> None:
    """Compare and write `int8_quality.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write to")
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    use_compilation_cache(None)
    exact, quantized = load(dtype="float32"), load(dtype="float32", quantization="int8")
    pieces = np.array(held_out_pieces(exact, options.texts, options.tokens), np.int32)
    found = [compare(exact, quantized, pieces[i : i + BATCH]) for i in range(0, len(pieces), BATCH)]
    by_text = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    report: dict[str, Any] = {
        "texts": len(pieces), "tokens": options.tokens, "device": jax.devices()[0].platform, "dtype": "float32",
        "versions": versions(),
    }  # fmt: skip
    for name, values in by_text.items():
        mean, low, high = float(values.mean()), *interval(values)
        report[name] = {"mean": mean, "low": low, "high": high}
    for name in ("float32", "int8"):
        report[f"perplexity_{name}"] = float(np.exp(report.pop(f"nats_{name}")["mean"]))
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    if options.out is not None:
        (options.out / "int8_quality.json").write_text(text)


def compare(exact: Model, quantized: Model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Means of each text `[texts, tokens]`."""
    p, q = (distributions(model, tokens) for model in (exact, quantized))
    following = tokens[:, 1:, None]
    return {
        "kl": (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=1),
        "same_first_choice": (p.argmax(axis=-1) == q.argmax(axis=-1)).mean(axis=1),
        "nats_float32": -np.take_along_axis(p, following, axis=-1).mean(axis=(1, 2)),
        "nats_int8": -np.take_along_axis(q, following, axis=-1).mean(axis=(1, 2)),
    }


def distributions(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of the next token at every position but the last, float64."""
    plain = model.autoregressive(SamplingConfig())
    return np.asarray(model.programs.run(log_probabilities, plain, model.params, jnp.asarray(tokens)), np.float64)


if __name__ == "__main__":
    main()
