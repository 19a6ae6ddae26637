"""How much of what the embedded head drafts is accepted: `python -m benchmarks.acceptance --out benchmarks/results`.

Prompts are pieces of the held-out modules, 64 tokens each, and any set given with `--prompts NAME=FILE` (JSON lines
with `turns`), whose first turns are cut to their last 256 tokens. Every tree and chain, greedily and at temperature 1;
one batch a setting; 128 new tokens a prompt. Lengths count the bonus token (the papers' tau); figures by depth are
shares of all rounds, so that they sum to the length less one.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moespec_jax.cli.command import Parser, run_command
from moespec_jax.cli.prompts import read_prompt_file
from moespec_jax.config import TreeConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import RunResult

LONGEST, NEW = 256, 128
TREES = [TreeConfig(7, 10, 60), TreeConfig(4, 4, 16), TreeConfig(2, 2, 6)]
TREES += [TreeConfig(depth, 1, depth + 2) for depth in (7, 4, 2, 1, 0)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every prompt set, tree and temperature, and write `acceptance.json`; returns the exit status: 0, 2 for a
    head that cannot draft the trees, or another error that the user can fix."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory to write acceptance.json to (default: print)")
    parser.add_argument("--prompts", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--count", type=int, default=64, help="prompts of each set")
    parser.add_argument("--draft-model", help="another EAGLE-3 head for the embedded target")
    return run_command(parser, _run, argv)


def _run(options: argparse.Namespace) -> None:
    model = load(draft_model=options.draft_model, dtype="float32")
    check_trees(model, TREES)
    sets = {"held-out modules": held_out_pieces(model, options.count)}
    for given in options.prompts:
        name, _, file = given.partition("=")
        texts = read_prompt_file(Path(file))[: options.count]
        sets[name] = [model.encode(text)[-LONGEST:] for text in texts]
    where = model.generate([[0]], max_new_tokens=1)
    report: dict[str, Any] = {
        "new_tokens": NEW,
        "device": where.device,
        "dtype": where.dtype,
        "versions": where.versions,
    }
    report["rows"] = [row for name, prompts in sets.items() for row in measure(model, name, prompts)]
    if options.out is None:
        print(json.dumps(report))
    else:
        (options.out / "acceptance.json").write_text(json.dumps(report, indent=1) + "\n")


def check_trees(model: Model, trees: Iterable[TreeConfig | None]) -> None:
    """Check that the model's head drafts all trees, before anything is measured.

    Raises:
        RequestError: it does not: a DFlash or DSpark head drafts chains of its block alone.
    """
    for tree in trees:
        model.resolve(DecodingSpec(tree))


def measure(model: Model, name: str, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """Every tree at both temperatures, each set of prompts as one batch."""
    for temperature in (0.0, 1.0):
        for tree in tqdm(TREES, desc=f"{name}, temperature {temperature:g}", unit="tree"):
            result = model.generate(prompts, tree=tree, max_new_tokens=NEW, temperature=temperature, ignore_eos=True)
            yield {"prompts": name, "count": len(prompts), "temperature": temperature, **summary(tree, result)}


def summary(tree: TreeConfig, result: RunResult) -> dict[str, Any]:
    """Acceptance over all rounds of all prompts."""
    rounds = sum(p.rounds for p in result.prompts)
    by_depth = np.sum([np.array(p.accepted_by_depth) * p.rounds for p in result.prompts], axis=0) / rounds
    return {
        "tree": tree.name,
        "rounds": rounds,
        "accept_length": round(1 + float(by_depth.sum()), 3),
        "accepted_by_depth": by_depth.round(3).tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
