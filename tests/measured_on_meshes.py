"""What the measuring commands find on one device and on meshes: a program of its own, for the number of devices is
settled at its start. Prints, as JSON, the results of every command on one device and on every mesh.

python tests/measured_on_meshes.py DIRECTORY COMMAND... --mesh data=2,expert=2 ...
"""

import argparse
import contextlib
import functools
import io
import json
from pathlib import Path
from typing import Any

import jax
from tiny_pair import write_pair

import moespec_jax.evaluate.__main__ as evaluate
from moespec_jax.cli import arguments
from moespec_jax.runtime.load import load

PROMPTS = ["the cat sat", "import os", "def f("]
TREE = ["--tree-size", "40", "--tree-depth", "2", "--tree-top-k", "8"]
# Eight heads and experts, so that eight devices have something to split.
TARGET = dict(num_attention_heads=8, num_key_value_heads=2, num_experts=8, max_position_embeddings=160)


def evaluated(flags: list[str], output: Path) -> Any:
    """Rows of texts and of questions: exactly, under a budget, and under one that prunes; three texts, two at once."""
    prompts, questions = output.parent / "prompts.txt", output.parent / "sums.jsonl"
    rows = [{"turns": [f"What is {n}?"], "reference": [str(n)]} for n in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--tokens", "12", "--answer-tokens", "6", "--batch", "2", "--output", str(output)]
    rule = ["--expert-budget", "3", "--budget-score", "depth", "--budget-min-kept-weight", "0.3"]
    given = ["--prompts", f"mine={prompts}", "--answers", str(questions), "--json"]
    rows = run(evaluate.main, [*flags, *TREE, *sizes, *rule, *given])
    return {"rows": rows, "tasks": tasks(output / "pieces.jsonl")}


def tasks(ledger: Path) -> list[Any]:
    """Finished tasks of a ledger, without its request."""
    return [json.loads(line) for line in ledger.read_text().splitlines()[1:]]


def run(main: Any, argv: list[str]) -> list[Any]:
    """JSON lines that a good run prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*argv, "--backend", "slots", "--compilation-cache", "none"]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


COMMANDS = {"evaluate": evaluated}


def main() -> None:
    """Run as asked on one device and on every mesh."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("commands", nargs="+", choices=COMMANDS)
    parser.add_argument("--mesh", nargs="+", required=True)
    asked = parser.parse_args()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_default_matmul_precision", "highest")
    pair = write_pair(asked.directory / "pair", 1, **TARGET)[:4]
    (asked.directory / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    # All commands share a model and its programs.
    once = functools.cache(load)
    arguments.load = lambda *given, check, **options: once(*given, **options)
    found: dict[str, Any] = {}
    for mesh in (None, *asked.mesh):
        flags = pair if mesh is None else [*pair, "--mesh", mesh]
        name = mesh or "one"
        found[name] = {c: COMMANDS[c](flags, asked.directory / f"{c} {name}") for c in asked.commands}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
