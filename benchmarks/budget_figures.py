"""The pictures of docs/budgets.md: `python -m benchmarks.budget_figures --out docs` (needs matplotlib).

`routing_tail.png` is measured here: for draft trees of 60 tokens over held-out text, which share of a layer's summed
router probability the heaviest experts hold, of the embedded target. `budget_quality.png` is drawn from
`results/budget_quality.json`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from moespec_jax.config import TreeConfig
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.decoding.spec import DecodingSpec
from moespec_jax.measure.prompt_sets import held_out_pieces
from moespec_jax.runtime.load import load
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.run import Batch, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
TREE, TREES = TreeConfig(7, 10, 60), 24
SHOWN = {
    "MoE-Spec (probability, all)": ("MoE-Spec's own rule", "tab:red", "o"),
    "path, all": ("rows weighted by their chance", "tab:orange", "s"),
    "path, squares (default)": ("and squared weights (default)", "tab:blue", "o"),
    "path, squares, faithfulness 0.3": ("and faithfulness 0.3", "tab:green", "^"),
    "path, squares, guarantee 0, faithfulness 0.5": ("and faithfulness 0.5, likely rows whole", "tab:purple", "v"),
}


def main() -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the pictures to")
    options = parser.parse_args()
    model = load(dtype="float32")
    draw_tail(tree_probabilities(model), model.config.num_experts_per_tok, options.out / "routing_tail.png")
    draw_quality(json.loads((RESULTS / "budget_quality.json").read_text()), options.out / "budget_quality.png")
    return 0


def tree_probabilities(model: Model) -> np.ndarray:
    """Router probabilities `[layers, trees, nodes, experts]` of trees drafted over held-out text."""
    method, params = model.speculative(DecodingSpec(TREE), SamplingConfig()), model.speculative_params
    prompts = held_out_pieces(model, TREES)
    batch = Batch(prompts, [len(p) + 40 for p in prompts], (), 0)
    state = Run(model.programs, method, params, batch).state_after(2)
    trees, drafted = jax.jit(method.propose)(params, state)
    _, _, info = jax.jit(method.verify)(params, drafted, trees)
    return np.stack([np.asarray(r.probabilities).reshape(TREES, TREE.size, -1) for r in info.routers])


def draw_tail(probabilities: np.ndarray, k: int, file: Path) -> None:
    """Cumulative share by rank of the experts: of one token, and of a tree."""
    experts = probabilities.shape[-1]
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    one = np.sort(probabilities[:, :, 0], axis=-1)[..., ::-1].cumsum(-1).mean(axis=(0, 1))
    ranks = np.arange(experts + 1)
    axes.plot(ranks, [0, *one], color="0.6", label="one token")
    sums = np.sort(probabilities.sum(axis=2), axis=-1)[..., ::-1]
    held = (sums.cumsum(-1) / sums.sum(-1, keepdims=True)).mean(axis=1)
    for layer, curve in enumerate(held):
        label = "a tree of 60 tokens, each layer" if layer == 0 else None
        axes.plot(ranks, [0, *curve], color="tab:blue", alpha=0.45, linewidth=1, label=label)
    mean = held.mean(axis=0)
    axes.plot(ranks, [0, *mean], color="tab:blue", linewidth=2.2, label="their mean")
    for budget in (experts // 4, experts // 2):
        axes.vlines(budget, 0, mean[budget - 1], color="0.75", linewidth=1)
        axes.annotate(
            f"B = {budget}: {mean[budget - 1]:.0%}", (budget, mean[budget - 1]), (6, -14), textcoords="offset points"
        )
    axes.set(xlabel=f"heaviest experts of {experts} (a token goes to {k})", ylabel="share of router probability")
    axes.set(xlim=(0, experts), ylim=(0, 1.01))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_quality(report: dict[str, Any], file: Path) -> None:
    """Divergence and acceptance by budget, of some rules, on both kinds of text."""
    figure, axes = plt.subplots(2, 2, figsize=(8.6, 6.4), layout="constrained", sharex=True)
    for column, (text, title) in enumerate(
        {"held-out": "held-out text", "own": "the target's own greedy text"}.items()
    ):
        exact = next(r for r in report["rows"] if r["text"] == text and r["rule"] == "exact")
        for rule, (label, colour, marker) in SHOWN.items():
            rows = [r for r in report["rows"] if r["text"] == text and r["rule"] == rule]
            if not rows:
                continue
            budgets = [r["budget"] for r in rows]
            kl, low, high = ([v for v in vs] for vs in zip(*((r["kl"], *r["kl_95"]) for r in rows), strict=True))
            axes[0, column].plot(budgets, kl, color=colour, marker=marker, label=label)
            axes[0, column].fill_between(budgets, low, high, color=colour, alpha=0.15, linewidth=0)
            axes[1, column].plot(budgets, [r["accept_length"] for r in rows], color=colour, marker=marker)
        axes[1, column].axhline(exact["accept_length"], color="0.6", linestyle=":", label="without a budget")
        axes[0, column].set(title=title, yscale="log")
        axes[1, column].set(xlabel=f"experts read a layer, of {report['num_experts']}", ylim=(1, None))
    axes[0, 0].set(ylabel="divergence from the exact target, nats")
    axes[1, 0].set(ylabel="tokens gained a round")
    lines = [*axes[0, 0].get_lines(), axes[1, 0].get_lines()[-1]]
    figure.legend(handles=lines, frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    for one in axes.ravel():
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
