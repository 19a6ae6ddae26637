"""List the commands: `python -m moespec_jax`."""

import argparse
import sys
from collections.abc import Sequence

from moespec_jax import __version__

COMMANDS = {
    "moespec_jax.generate": "generate text, plainly or speculatively",
    "moespec_jax.chat": "talk with a model",
    "moespec_jax.bench": "measure whether speculative decoding pays",
    "moespec_jax.tune": "find the fastest tree and expert budget",
    "moespec_jax.evaluate": "measure what a budget or quantization costs",
    "moespec_jax.evaluate.lm_eval": "run lm-evaluation-harness on a model",
    "moespec_jax.study": "measure routing, trees and budgets, with figures",
    "moespec_jax.plan": "find the GPUs and TPU slices that a model fits",
    "moespec_jax.train": "train an EAGLE-3, DFlash or DSpark draft head",
    "moespec_jax.train.regenerate": "let a target write the training data",
    "convert.to_orbax": "convert a checkpoint to orbax",
    "convert.to_hf": "convert a checkpoint to safetensors",
    "convert.draft": "convert a draft head for SGLang or vLLM",
    "convert.check": "compare with transformers, or check files",
    "convert.probe_draft": "test which hidden states a draft head reads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the list; returns the exit status: 0, or 2 for arguments, which this command has not."""
    parser = argparse.ArgumentParser(
        prog="python -m moespec_jax",
        description=f"Speculative decoding for Mixture-of-Experts models.\n\npython -m COMMAND --help:\n{listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moespec_jax {__version__}")
    _, others = parser.parse_known_args(argv)
    if others:
        name = f"moespec_jax.{others[0]}"
        hint = f"run python -m {name}" if name in COMMANDS else "python -m moespec_jax lists the commands"
        print(f"error: expected no arguments; got {others[0]!r}: {hint}", file=sys.stderr)
        return 2
    parser.print_help()
    return 0


def listing() -> str:
    """Format the commands, one a line."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items())


if __name__ == "__main__":
    sys.exit(main())
