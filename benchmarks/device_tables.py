"""Tables of docs about devices: models that fit, compilation times, copies in GPU programs, meshes, int8 experts.

Each function returns head and rows.
"""

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]


def chip_memory(verifications: dict[str, Any], rounds: dict[str, Any]) -> Table:
    """List which model fits one chip, and the compilation time of the loop over rounds: one row a model, one column a
    chip."""
    rows, chips = verifications["rows"], list(dict.fromkeys(row["chip"] for row in verifications["rows"]))
    found = []
    for model, needed in whole_models(rounds).items():
        cells = []
        for chip in chips:
            fits = all(row["fits"] for row in rows if (row["model"], row["chip"]) == (model, chip))
            cells.append(f"yes, {_compile_seconds(rounds, model, chip)}" if fits else "no")
        found.append([model, f"{needed['weights_gb']:.1f} GB", f"{needed['cache_mb'] / 1e3:.2f} GB", *cells])
    return ["model", "weights and head", "caches", *(f"one {chip}" for chip in chips)], found


def plan_cards(plan: dict[str, Any]) -> Table:
    """List how many of each card hold a model, with the floor of a token: one row a model and precision, one column a
    card."""
    rows = plan["rows"]
    cards = list(dict.fromkeys(_card_of(row) for row in rows))
    found = []
    for model, experts in dict.fromkeys((row["model"], row["experts"]) for row in rows):
        own = [row for row in rows if (row["model"], row["experts"]) == (model, experts)]
        fitting = {_card_of(row): row for row in own if row["fits"]}
        found.append([model, experts, *(_cards_needed(fitting[card]) if card in fitting else "no" for card in cards)])
    return ["model", "experts", *cards], found


def _card_of(row: dict[str, Any]) -> str:
    return row["cards"].removeprefix(f"{row['devices']}x")


def _cards_needed(row: dict[str, Any]) -> str:
    share = "" if row["memory_fraction"] == 0.75 else f" with `{row['memory_fraction']:g}`".replace("0.", ".")
    return f"**{row['devices']}**{share}: {row['token_floor_ms']:.2g} ms"


def whole_models(rounds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Select the row of each model on one device, by model."""
    return {row["model"]: row for row in rounds["rows"]}


def headline(gpu: dict[str, Any], quality: dict[str, Any]) -> Table:
    """List speed on a GPU by tree and budget, beside the divergence of the embedded pair."""
    rows = {row["spec"]: row for row in gpu["rows"] if row["backend"] == "fused"}
    plain = rows["plain"]["tokens_per_s"]
    names = {
        "plain": ("plain decoding", None), "4/2/1": ("chain of 4", None), "16/4/4": ("tree of 16", None),
        "60/7/10": ("tree of 60", None), "60/7/10 B=32": ("tree of 60, half of the experts", 2),
        "60/7/10 B=16": ("tree of 60, a quarter of the experts", 4),
    }  # fmt: skip
    found = []
    for spec, (name, part) in names.items():
        row = rows[spec]
        loss = "0" if part is None else f"{_divergence(quality, quality['num_experts'] // part):.4f} nats"
        output = "exact" if part is None else "LOSSY"
        speed = row["tokens_per_s"]
        found.append(
            [name, output, f"{speed:.0f} tokens/s", f"{speed / plain:.2f}x", f"{row['experts_read']:.0f}", loss]
        )
    head = ["decoding", "output", f"one {_card(gpu)}", "over plain", "experts read a layer, of 64", "divergence"]
    return head, found


def gpu_rounds(*reports: dict[str, Any]) -> Table:
    """List milliseconds a round on a GPU, beside the time that its bytes take."""
    found = []
    for row in (row for report in reports for row in report["rows"]):
        ms, prefill = row["ms"], row["prefill_ms"]
        share = row["floor_ms"] / ms["median"]
        found.append(
            [f"`{row['backend']}`", row["spec"], "LOSSY" if row["lossy"] else "exact", f"{row['experts_read']:.1f}"]
            + [f"{ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f})", f"{row['floor_ms']:.2f}", f"{share:.0%}"]
            + [f"{row['accept_length']:.2f}", f"{row['tokens_per_s']:.0f}", f"{prefill['median']:.0f}"]
        )
    head = ["back-end", "tree and budget", "output", "experts read", "ms a round", "ms of its bytes", "share"]
    return head + ["tokens a round (simulated)", "tokens/s", "prefill of 512, ms"], found


def gpu_kernels(report: dict[str, Any]) -> Table:
    """List microseconds of a round by kernel, one column for each spec."""
    specs = {spec["spec"]: {row["kernel"]: row for row in spec["kernels"]} for spec in report["specs"]}
    names = dict.fromkeys(name for rows in reversed(specs.values()) for name in rows)
    found = []
    for name in names:
        cells = [rows.get(name) for rows in specs.values()]
        found.append([name, *("" if row is None else f"{row['us']:.0f} in {row['launches']:.0f}" for row in cells)])
    return ["kernels", *(f"{spec}, us in launches" for spec in specs)], found


def gpu_prefill(report: dict[str, Any]) -> Table:
    """List milliseconds of the prefill of one prompt on a GPU."""
    found = []
    for row in report["prefill"]:
        ms = row["ms"]
        rate = f"{row['tokens'] / ms['median'] * 1e3:,.0f}"
        found.append([str(row["tokens"]), f"{ms['median']:.1f} ({ms['min']:.1f} to {ms['max']:.1f})", rate])
    return ["tokens of the prompt", "ms", "tokens/s"], found


def _divergence(quality: dict[str, Any], budget: int) -> float:
    """Divergence of the default rule on held-out text."""
    rows = [r for r in quality["rows"] if r["text"] == "held-out" and r["budget"] == budget]
    return next(r["kl"] for r in rows if r["rule"].startswith("path, squares ("))


def _card(report: dict[str, Any]) -> str:
    return report["device"].removeprefix("gpu (NVIDIA ").removesuffix(" HBM3)")


def expert_copies(report: dict[str, Any]) -> Table:
    """List copies of experts in GPU programs without a budget: one row a model, GPU and back-end, one column a number
    of tokens."""
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


def gpu_launches(report: dict[str, Any]) -> Table:
    """List the kernels of compiled GPU programs, before and after parts of a layer became kernels."""

    def cell(pair: tuple[dict[str, Any], dict[str, Any]], name: str, form: str) -> str:
        before, after = (row[name] for row in pair)
        return "" if after is None else f"{format(before, form)} → {format(after, form)}"

    columns = (("kernels_per_layer", "g"), ("draft_level", "g"), ("rest", "g"), ("kernels_per_round", ",g"))
    found = []
    for pair in zip(report["before"], report["after"], strict=True):
        row = pair[1]
        cells = [cell(pair, name, form) for name, form in columns]
        found.append([row["model"], row["gpu"], row["program"], *cells, cell(pair, "temp_mb", ".0f") + " MB"])
    return ["model", "GPU", "program", "a layer", "a draft level", "rest", "a round", "temporary"], found


def embedded_pair(report: dict[str, Any]) -> Table:
    """List compilation times of the embedded pair, summed over programs: one row a decoding method and dtype, one
    column a chip."""
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
        if (row["model"], row["chip"], row["backend"]) == (model, chip, "pallas")
    ]
    return f"{min(seconds):.0f} to {max(seconds):.0f} s" if len(seconds) > 1 else f"{seconds[0]:.0f} s"


def sizing(plan: dict[str, Any]) -> Table:
    """List the smallest slice that holds a model: one row a model and precision, one column a chip."""
    rows = plan["rows"]
    chips = list(dict.fromkeys(row["slice"].partition("-")[0] for row in rows))
    found = []
    for model, experts in dict.fromkeys((row["model"], row["experts"]) for row in rows):
        cells = []
        for chip in chips:
            fitting = [
                row
                for row in rows
                if (row["model"], row["experts"]) == (model, experts) and row["slice"].startswith(chip) and row["fits"]
            ]
            cells.append(_smallest(fitting[0]) if fitting else "none of these")
        found.append([model, experts, *cells])
    return ["model", "experts", *chips], found


def _smallest(row: dict[str, Any]) -> str:
    memory = f"**{row['slice']}**: {row['memory'] / 1e9:.1f} of {row['available'] / 1e9:.1f} GB"
    if row["devices"] == 1:
        return memory
    moved = sum(size for _, size in row["collectives"].values()) / 1e6
    return f"{memory} ({row['mesh'].removeprefix('data=1,')}), {moved:.0f} MB exchanged"


def mesh_bytes(report: dict[str, Any]) -> Table:
    """List memory, bytes read and collectives of one device of a slice, one row a budget and precision."""
    found = []
    for row in report["rows"]:
        moved = ", ".join(f"{runs} {kind} ({size / 1e6:.1f} MB)" for kind, (runs, size) in row["collectives"].items())
        mesh = " x ".join(str(size) for size in row["mesh"].values())
        found.append(
            [row["model"], f"{row['slice']}, {mesh}", row["experts"], row["budget"]]
            + [f"{row['memory_gb']:.1f} of {row['hbm_gb']:.1f}", f"{row['expert_mb']:.0f}"]
            + [f"{row['ideal_expert_mb']:.0f}", f"{row['expert_ratio']:.2f}", f"{row['hbm_mb'] / 1e3:.2f}"]
            + [moved or "none"]
        )
    head = ["model", "slice, mesh", "experts", "budget", "GB a device", "expert MB a layer", "ideal", "ratio"]
    return [*head, "GB a verification", "collectives a round"], found


def mesh_equality(report: dict[str, Any]) -> Table:
    """Count the decoding methods whose output on a mesh equals that of one device: one row a family, one column a
    mesh."""
    rows = report["rows"]
    places = list(dict.fromkeys((row["mesh"], row["processes"]) for row in rows))
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = []
        for place in places:
            here = [row for row in rows if row["family"] == family and (row["mesh"], row["processes"]) == place]
            cells.append(f"{sum(row['same'] for row in here)} of {len(here)}")
        found.append([family, *cells])
    names = [mesh if processes == 1 else f"{mesh}, {processes} processes" for mesh, processes in places]
    return ["family", *names], found


def int8_quality(report: dict[str, Any]) -> Table:
    """List the quality of int8 experts, with intervals over texts."""

    def cell(name: str, form: str) -> str:
        mean, low, high = (format(report[name][key], form) for key in ("mean", "low", "high"))
        return f"**{mean}** ({low} to {high})"

    perplexities = f"{report['perplexity_float32']:.3f}, {report['perplexity_int8']:.3f}"
    row = [cell("kl", ".6f"), cell("same_first_choice", ".2%"), perplexities]
    return ["divergence, nats", "same first choice", "perplexity, float32 and int8"], [row]


# Function and result files of each table.
TABLES: dict[str, tuple[Callable[..., Table], tuple[str, ...]]] = {
    "chip_memory": (chip_memory, ("tpu_verify.json", "tpu_speculate.json")),
    "plan_cards": (plan_cards, ("plan_cards.json",)),
    "embedded_pair": (embedded_pair, ("tpu_pair.json",)),
    "headline": (headline, ("gpu_h100.json", "budget_quality.json")),
    "gpu_rounds": (gpu_rounds, ("gpu_h100.json", "gpu_h100_triton.json")),
    "gpu_kernels": (gpu_kernels, ("gpu_h100_kernels.json",)),
    "gpu_prefill": (gpu_prefill, ("gpu_h100.json",)),
    "expert_copies": (expert_copies, ("gpu_compile.json",)),
    "gpu_launches": (gpu_launches, ("gpu_programs.json",)),
    "sizing": (sizing, ("plan.json",)),
    "mesh_bytes": (mesh_bytes, ("tpu_mesh.json",)),
    "int8_quality": (int8_quality, ("int8_quality.json",)),
    "mesh_equality": (mesh_equality, ("meshes.json",)),
}
