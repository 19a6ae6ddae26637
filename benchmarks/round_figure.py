"""Draw one round of speculative decoding with the embedded pair: a tree of 12 nodes with the accepted path, and its
attention mask.

    python -m benchmarks.round_figure --out docs/round.png

Exact, greedy, float32; the tree and what is accepted are real.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import moespec_jax
from moespec_jax import TreeConfig
from moespec_jax.cli.round_trace import round_records
from moespec_jax.measure.plots import draw_mask, draw_tree, token_labels

matplotlib.use("Agg")
from matplotlib import pyplot

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
TREE = TreeConfig(depth=3, top_k=3, size=12)


def main() -> int:
    """Decode, and draw one round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/round.png"))
    arguments = parser.parse_args()
    model, records = moespec_jax.load(), []
    model.generate(
        PROMPT, tree=TREE, max_new_tokens=160, on_round=lambda number, info: records.extend(round_records(number, info))
    )
    # Of the rounds that accept a path to the tree's end, the one with the most different words on it.
    record = max(records, key=lambda r: (len(r["accepted"]) == TREE.longest_path - 1, _words(model, r)))
    parents, accepted = record["parents"], record["accepted"]
    labels = token_labels(model.decode, record["tokens"])
    (bonus,) = token_labels(model.decode, [record["bonus"]])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=[7, 4.6], layout="constrained")
    draw_tree(left, parents, labels, np.exp(record["scores"]), accepted, bonus)
    draw_mask(right, parents, labels, accepted)
    left.set_title("Draft tree: number, token, path probability. Blue: accepted; dashed: bonus token", fontsize=10)
    right.set_title("Its attention mask", fontsize=10)
    figure.savefig(arguments.out, dpi=110)
    return 0


def _words(model: moespec_jax.Model, record: dict[str, Any]) -> int:
    path = [record["tokens"][node] for node in (0, *record["accepted"])]
    return len({text for text in token_labels(model.decode, path) if text.strip("·").isalpha()})


if __name__ == "__main__":
    sys.exit(main())
