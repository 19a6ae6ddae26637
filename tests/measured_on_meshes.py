"""Run the measuring commands on one device and on meshes: a program of its own, for the number of devices is settled
at its start. Prints, as JSON, the results of every command on one device and on every mesh.

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

import moespec_jax.bench.__main__ as bench
import moespec_jax.evaluate.__main__ as evaluate
import moespec_jax.study.__main__ as study
import moespec_jax.tune.__main__ as tune
from moespec_jax.cli import arguments
from moespec_jax.config import TreeConfig
from moespec_jax.decoding import autoregressive
from moespec_jax.decoding.budget_config import BudgetConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.evaluate.loglikelihood import Text, score_batch
from moespec_jax.evaluate.specs import evaluated_spec
from moespec_jax.measure.timing import decode_once
from moespec_jax.parallel.mesh import parse_mesh
from moespec_jax.runtime.load import load
from moespec_jax.study.rules import PAPER
from moespec_jax.tune import search
from moespec_jax.tune.cost import Cost, Measured

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


def studied(flags: list[str], output: Path) -> Any:
    """All tasks but the timing: demand, pairs of experts, reconstruction and divergence of MoE-Spec's rule."""
    sizes = ["--tokens", "8", "--rounds", "2", "--batch", "2", "--timed-prompts", "0", "--output", str(output)]
    rules = ["--rules", PAPER, "--budgets", "3"]
    run(study.main, [*flags, *TREE, *sizes, *rules, "--prompts", f"mine={output.parent / 'prompts.txt'}"], lines=False)
    return {"tasks": tasks(output / "study.jsonl"), "files": (output / "frontier.csv").read_text()}


def tuned(flags: list[str], output: Path) -> Any:
    """Search with a price for every round; returns what it chose, and all that it measured but seconds."""
    prices = Cost((1e-3, 2e-4, 1e-5, 2e-5, 3e-4), ())
    search.FINALISTS, search.BUDGETED_TREES = 3, 1
    measured = [
        Measured(tree, experts, prices.round_s(tree, experts))
        for tree in search.ANCHORS for experts in (5.0, min(8.0, 5.0 + tree.size / 8))
    ]  # fmt: skip
    search.time_anchors = lambda *_: (measured, [])

    def priced(model: Any, prompts: Any, cases: Any, tokens: int, repeats: int, *_: Any, **__: Any) -> Any:
        turn = {name: decode_once(model, prompts, case, tokens) for name, case in cases.items()}
        for name, stats in turn.items():
            tree = cases[name].spec.tree
            seconds = 0.1 if tree is None else prices.round_s(tree, stats["experts_read"])
            stats["decode_s"] = stats["rounds"] * seconds
        return [turn] * repeats

    search.time_interleaved = priced
    space = ["--tree-depth", "2", "--tree-top-ks", "1", "3", "--tree-sizes", "8", "--budgets", "0.5", "--max-kl", "5"]
    sizes = ["--tokens", "8", "--repeats", "1", "--output", str(output)]
    given = ["--prompts", f"mine={output.parent / 'prompts.txt'}"]
    run(tune.main, [*flags, *space, *sizes, *given], lines=False)
    profile = json.loads((output / "profile.json").read_text())
    del profile["costs"]  # name the heads of the model, which a mesh repeats
    return {"profile": profile, "tasks": tasks(output / "tune.jsonl")}


def timed(flags: list[str], output: Path) -> Any:
    """Rows and turns of plain decoding, a tree and a budget, one prompt and two at a time, without their seconds."""
    configs = ["--config-list", "1,3,8,40", "2,0,0,0", "2,3,8,40", "--budgets", "3", "--budget-score", "depth"]
    sizes = ["--tokens", "8", "--repeats", "1", "--count", "2", "--output", str(output)]
    rows = run(bench.main, [*flags, *configs, *sizes, "--prompts", f"mine={output.parent / 'prompts.txt'}", "--json"])
    turns = [task["value"] for task in tasks(output / "turns.jsonl") if "turn" in task["task"]]
    of_rows = ("setting", "mesh", "exchanged_mb", "experts_read", "accept_length", "same_tokens_as_plain")
    return {
        "turns": [{n: v for n, v in turn.items() if not n.endswith("_s") and "exchanged" not in n} for turn in turns],
        "rows": [{name: row[name] for name in of_rows} for row in rows],
        "table": (output / "bench.md").read_text(),
    }


def scored(flags: list[str], output: Path) -> Any:
    """Scores of texts as lm-evaluation-harness has them: directly, of two chunks, and by verifications."""
    model = arguments.load(flags[1], flags[3], check=None, mesh=parse_mesh(flags[5]) if flags[5:] else None)
    texts = [Text([5, 6, 7, 9] * 6, 3, [8, 1]), Text([9], 1, [5]), Text([3] * 30, 25, [4])]
    tight = DecodingSpec(TreeConfig(2, 2, 6), BudgetConfig(3, score="probability", credit="all"))
    autoregressive.PREFILL_CHUNK = 16
    ways = [evaluated_spec(model, spec) for spec in (DecodingSpec(), tight)]
    return [score_batch(model, way, texts, 3) for way in ways]


def tasks(ledger: Path) -> list[Any]:
    """Finished tasks of a ledger, without its request."""
    return [json.loads(line) for line in ledger.read_text().splitlines()[1:]]


def run(main: Any, argv: list[str], lines: bool = True) -> list[Any]:
    """JSON lines that a good run prints, if it prints some."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*argv, "--backend", "slots", "--compilation-cache", "none"]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()] if lines else []


COMMANDS = {"evaluate": evaluated, "study": studied, "tune": tuned, "bench": timed, "scores": scored}


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
