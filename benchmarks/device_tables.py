"""What the committed compilations say about devices: which models fit, what compiling takes, what GPU programs copy."""

import math
from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]
# Sizes of GPU memory that are sold.
CARDS = (16, 24, 48, 80, 141)


def chip_memory(verifications: dict[str, Any], rounds: dict[str, Any]) -> Table:
    """Head and rows: one row a model, one column a chip, with how long the loop over rounds took to compile."""
    rows, chips = verifications["rows"], list(dict.fromkeys(row["chip"] for row in verifications["rows"]))
    found = []
    for model, needed in whole_models(rounds).items():
        cells = []
        for chip in chips:
            fits = all(row["fits"] for row in rows if (row["model"], row["chip"]) == (model, chip))
            cells.append(f"yes, {_compile_seconds(rounds, model, chip)}" if fits else "no")
        found.append([model, f"{needed['weights_gb']:.1f} GB", f"{needed['cache_mb'] / 1e3:.2f} GB", *cells])
    return ["model", "weights and head", "caches", *(f"one {chip}" for chip in chips)], found


def card_memory(rounds: dict[str, Any]) -> Table:
    """Head and rows: one row a model, one column a size of memory: whether the share that JAX reserves by default
    holds weights, head and caches, whether a larger one does, or none."""
    found = []
    for model, needed in whole_models(rounds).items():
        size = needed["weights_gb"] + needed["cache_mb"] / 1e3
        shares = {"yes": 0.75, "with `.95`": 0.95, "no": math.inf}
        cells = [next(word for word, share in shares.items() if size <= share * card) for card in CARDS]
        found.append([model, f"{size:.1f} GB", *cells])
    return ["model", "needs", *(f"{card} GB" for card in CARDS)], found


def whole_models(rounds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each model takes on one device, by model."""
    return {row["model"]: row for row in rounds["rows"] if row["devices"] == 1}


def expert_copies(report: dict[str, Any]) -> Table:
    """Head and rows: one row a model, GPU and back-end, one column a number of tokens, all experts allowed."""
    rows = report["rows"]
    tokens = sorted({row["tokens"] for row in rows})
    found = []
    for model, gpu, backend in dict.fromkeys((row["model"], row["gpu"], row["backend"]) for row in rows):
        own = [row for row in rows if (row["model"], row["gpu"], row["backend"]) == (model, gpu, backend)]
        cells = []
        for count in tokens:
            widest = max((row for row in own if row["tokens"] == count), key=lambda row: row["slots"])
            cells.append(f"{len(widest['copies'])} matrices, {widest['temp_mb']:.1f} MB")
        found.append([model, gpu, f"`{backend}`", *cells])
    return ["model", "GPU", "back-end", *(f"{count} token{'s' * (count > 1)}" for count in tokens)], found


def embedded_pair(report: dict[str, Any]) -> Table:
    """Head and rows: one row a way to decode and dtype, one column a chip, with seconds over all its programs."""
    rows = report["rows"]
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    found = []
    for decoding, dtype in dict.fromkeys((row["decoding"], row["dtype"]) for row in rows):
        own = {row["chip"]: row["compile_s"] for row in rows if (row["decoding"], row["dtype"]) == (decoding, dtype)}
        found.append([decoding, dtype, *(f"{sum(own[chip].values()):.0f} s" for chip in chips)])
    return ["decoding", "dtype", *(f"one {chip}" for chip in chips)], found


def _compile_seconds(rounds: dict[str, Any], model: str, chip: str) -> str:
    seconds = [
        row["compile_s"]
        for row in rounds["rows"]
        if (row["model"], row["chip"], row["devices"], row["backend"]) == (model, chip, 1, "pallas")
    ]
    return f"{min(seconds):.0f} to {max(seconds):.0f} s" if len(seconds) > 1 else f"{seconds[0]:.0f} s"


# What makes each table, and of which results.
TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "chip_memory": (chip_memory, ("tpu_verify.json", "tpu_speculate.json")),
    "card_memory": (card_memory, ("tpu_speculate.json",)),
    "embedded_pair": (embedded_pair, ("tpu_pair.json",)),
    "expert_copies": (expert_copies, ("gpu_compile.json",)),
}
