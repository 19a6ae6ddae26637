"""Generate the tables of README and docs from the committed results: `python -m benchmarks.tables`.

A table is placed between `<!-- table:NAME -->` and `<!-- end -->`. `tests/test_readme.py` checks that the pages are
up to date.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import choosing_tables, device_tables, drafter_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# README first: `tests/test_readme.py` runs its example.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Rewrite all pages; returns the exit status."""
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def render(text: str) -> str:
    """Replace every table of a page by the current one."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def against_transformers() -> str:
    """List the times of both engines and their ratio, one row a shape and phase."""
    names = {"olmoe-4-layers": "OLMoE's shape, 4 layers", "demo": "the embedded model"}
    phases = {"decode_s_per_token": "decoding, one token", "prefill_512_s": "prefill of 512 tokens"}
    results = _read("against_transformers.json")
    rows = [
        [names[shape], phases[phase], _ms(row[phase]["moespec_jax"]), _ms(row[phase]["transformers"])]
        + [_ratio(row[phase]["speedup"]), f"{row['device']}, {row['dtype']}"]
        for shape, row in results.items()
        for phase in phases
    ]
    return _table(["model", "what", "moespec_jax", "transformers", "speed-up", "where"], rows)


def import_memory() -> str:
    """List peak memory over the size of the parameters, one row a source, back-end and dtype."""
    loads = [run for run in _read("import_memory.json")["runs"] if run["task"] == "load"]
    rows = [
        [run["from"], run["stored"], f"{run['stored_bytes'] / 1e9:.2f} GB", *run["how"][:2], f"{run['factor']:.2f}"]
        for run in loads
    ]
    return _table(["from", "stored as", "on disk", "back-end", "loaded as", "peak / parameters"], rows)


def import_quantized() -> str:
    """List peak memory over the size of the parameters, one row a format and the form of experts in memory."""
    rows = [
        [run["stored"], f"{run['stored_bytes'] / 1e9:.2f} GB", ", ".join(run["how"][1:]), f"{run['factor']:.2f}"]
        for run in _read("import_quantized.json")["runs"]
    ]
    return _table(["stored as", "on disk", "loaded as", "peak / parameters"], rows)


def tpu_compile() -> str:
    """Return the report of `tpu_compile.py` without its title."""
    return _untitled("tpu_compile.md")


def tpu_speculate() -> str:
    """Return the report of `tpu_speculate.py` without its title."""
    return _untitled("tpu_speculate.md")


def tpu_verify() -> str:
    """Return the report of `tpu_verify.py` without its title."""
    return _untitled("tpu_verify.md")


def demo_target() -> str:
    """Describe the embedded target: training and prediction quality."""
    record = _read(ROOT / "moespec_jax" / "demo" / "target_record.json")
    kept = record["mass_kept_of_60_tokens"]
    mean = {b: sum(layers) / len(layers) for b, layers in kept.items()}
    xz = f"`xz -9e` after the training text: {record['xz_bits_per_byte']:.3f}"
    seen = f"{record['tokens'] / 1e6:.1f} M tokens of Python source ({record['steps']} steps)"
    rows = [
        ["held-out bits per byte", f"{record['bits_per_byte']:.3f} ({xz})"],
        ["held-out text", f"{record['held_out_bytes'] / 1e6:.2f} MB: {', '.join(record['held_out'])}"],
        ["trained on", f"{seen}, CPU, float32"],
        ["busiest expert's load over the mean, by layer", ", ".join(f"{x:.2f}" for x in record["load_max_over_mean"])],
        [
            "router mass of 60 tokens on the B heaviest of 32 experts",
            ", ".join(f"B={b}: {share:.0%}" for b, share in mean.items()),
        ],
    ]
    return _table(["", ""], rows)


def demo_draft() -> str:
    """Describe the embedded draft head: training and accuracy."""
    record = _read(ROOT / "moespec_jax" / "demo" / "draft_record.json")
    rows = [
        ["trained on", f"{record['tokens'] / 1e6:.1f} M tokens ({record['steps']} steps), CPU, float32"],
        ["first choices guessed, held-out text, by draft step", _shares(record["held_out_accuracy_by_step"])],
        ["the same, training rows", _shares(record["training_accuracy_by_step"])],
    ]
    return _table(["draft head", ""], rows)


def acceptance() -> str:
    """List acceptance length and acceptance by depth, one row a prompt set, temperature and tree."""
    report = _read("acceptance.json")
    rows = [
        [row["prompts"], f"{row['temperature']:g}", row["tree"], f"**{row['accept_length']:.2f}**"]
        + [" ".join(f"{share:.2f}" for share in row["accepted_by_depth"]), str(row["rounds"])]
        for row in report["rows"]
    ]
    head = ["prompts", "temperature", "size/depth/top-k", "tokens a round", "accepted by depth", "rounds"]
    sets = {row["prompts"]: row["count"] for row in report["rows"]}
    what = ", ".join(f"{count} prompts of {name}" for name, count in sets.items())
    return f"{what}; {report['new_tokens']} new tokens each.\n\n{_table(head, rows)}"


def speculation() -> str:
    """List the speed-up over plain decoding and the parts of a round's time, one row a tree."""
    report = _read("speculation.json")
    rows = []
    for row in report["rows"]:
        parts = (
            [f"{row['round_ms'][part]['median']:.2f}" for part in ("draft", "verify", "rest")]
            if "round_ms" in row
            else []
        )
        rows.append(
            [row["tree"], _ratio(row["speed_up"]), f"{row['accept_length']:.2f}", _range(row["ms_per_token"])]
            + (parts or ["", "", ""])
            + ["yes" if row["same_tokens_as_plain"] else "no"]
        )
    head = ["decoding", "speed-up", "tokens a round", "ms a token", "draft ms", "verify ms", "rest ms", "same tokens"]
    where = f"{report['device']}, {report['dtype']}, 2 cores; {report['prompts']} prompts"
    return f"{where}, {report['new_tokens']} new tokens each, {report['repeats']} repeats.\n\n{_table(head, rows)}"


def budget_quality() -> str:
    """List the divergence of every rule by budget, on both kinds of text."""
    return _quality(lambda rule: True)


def budget_quality_short() -> str:
    """List the divergence of the rules that docs/results.md compares."""
    names = ("MoE-Spec (", "path, squares (", "path, squares, faithfulness 0.3", "path, squares, guarantee")
    return _quality(lambda rule: rule.startswith(names))


def budget_sizes() -> str:
    """List experts read and divergence of sizes that depend on the text."""
    report = _read("budget_quality.json")
    rows = [
        [row["rule"], f"{row['experts_read']:.1f}", f"{row['kl']:.4f} ({row['kl_95'][0]:.4f} to {row['kl_95'][1]:.4f})"]
        + [f"{row['top1']:.1%}", f"{row['accept_length']:.2f}"]
        for row in report["rows"]
        if row["text"] == "held-out" and row["budget"] == report["num_experts"]
    ]
    return _table(["rule", "experts read", "divergence", "first choices", "tokens a round"], rows)


def budget_equal() -> str:
    """List the budget at which a rule diverges as MoE-Spec's own rule does at another, one row a text and rule."""
    found = _read("budget_quality.json")["equal_quality"]
    budgets = sorted({entry["paper_budget"] for entry in found})
    rows = []
    for text, rule in dict.fromkeys((entry["text"], entry["rule"]) for entry in found):
        own = {e["paper_budget"]: e for e in found if (e["text"], e["rule"]) == (text, rule)}
        if rule.startswith(("path, squares (", "path, squares, faith", "path, hits", "depth")):
            spans = [(own[b]["budget"], *own[b]["budget_95"]) for b in budgets]
            rows.append([text, rule, *(f"**{at:.1f}** ({low:.1f} to {high:.1f})" for at, low, high in spans)])
    return _table(["text", "rule", *(f"as MoE-Spec at B = {b}" for b in budgets)], rows)


def budget_speed() -> str:
    """List the speed of budgets over exact speculation and plain decoding, one row a tree and budget."""
    report = _read("budget_speed.json")
    rows = [
        [row["tree"], row["budget"], _ratio(row["over_exact"]), _range(row["over_plain"])]
        + [f"{row['accept_length']:.2f}", f"{row['experts_read']:.1f}", f"{row['agreement']:.0%}"]
        for row in report["rows"]
    ]
    head = ["size/depth/top-k", "budget", "over exact", "over plain", "tokens a round", "experts read", "agreement"]
    where = f"{report['device']}, {report['dtype']}, 2 cores; {report['prompts']} prompts, {report['new_tokens']} new"
    plain = f"plain decoding {report['plain_tokens_per_s']['median']:.0f} tokens/s"
    return f"{where} tokens each, {report['repeats']} repeats; {plain}.\n\n{_table(head, rows)}"


def real_shapes() -> str:
    """List the time of a verification at published shapes, one row a model, tree and budget."""
    rows = []
    for report in _read("real_shapes.json").values():
        name = f"{report['model']}, {report['layers']} layers"
        for row in report["rows"]:
            budget = "exact" if row["budget"] is None else f"B = {row['budget']}"
            rows.append(
                [name, report["device"], report["dtype"], row["tree"], budget, f"{row['experts_read']:.0f}"]
                + [f"{_range(row['verify_ms'])}", _ratio(row["verify_over_exact"])]
                # A CPU reads faster than it copies, so the share is omitted there.
                + ["" if report["device"].startswith("cpu") else f"{row['share_of_copy_bandwidth']:.0%}"]
            )
    head = ["shape", "device", "dtype", "tree", "budget", "experts read", "verification ms", "over exact"]
    return _table([*head, "of copy bandwidth"], rows)


# Tables of other modules: function and result files.
MADE = device_tables.TABLES | choosing_tables.TABLES | drafter_tables.TABLES


def made(name: str) -> str:
    """Render a table of `MADE`."""
    make, files = MADE[name]
    return _table(*make(*(_read(file) for file in files)))


TABLES: dict[str, Callable[[], str]] = {
    "against_transformers": against_transformers,
    "import_memory": import_memory,
    "import_quantized": import_quantized,
    "tpu_compile": tpu_compile,
    "tpu_speculate": tpu_speculate,
    "tpu_verify": tpu_verify,
    "demo_target": demo_target,
    "demo_draft": demo_draft,
    "acceptance": acceptance,
    "speculation": speculation,
    "budget_quality": budget_quality,
    "budget_quality_short": budget_quality_short,
    "budget_equal": budget_equal,
    "budget_sizes": budget_sizes,
    "budget_speed": budget_speed,
    "real_shapes": real_shapes,
    **{name: partial(made, name) for name in MADE},
}


def _quality(shown: Callable[[str], bool]) -> str:
    report = _read("budget_quality.json")
    tables = []
    for text, title in {"held-out": "held-out text", "own": "the target's own greedy text"}.items():
        rows = [row for row in report["rows"] if row["text"] == text]
        exact = next(row["accept_length"] for row in rows if row["rule"] == "exact")
        budgets = sorted({row["budget"] for row in rows if row["rule"] == "MoE-Spec (probability, all)"})
        lines = []
        for rule in dict.fromkeys(row["rule"] for row in rows if row["rule"] != "exact" and shown(row["rule"])):
            own = {row["budget"]: row for row in rows if row["rule"] == rule}
            if set(own) == set(budgets):
                lines.append([rule, *(_quality_cell(own[budget]) for budget in budgets)])
        head = [title, *(f"B = {budget} of {report['num_experts']}" for budget in budgets)]
        note = f"Without a budget: {exact:.2f} tokens a round."
        tables.append(f"{_table(head, lines)}\n\n{note}")
    return "\n\n".join(tables)


def _quality_cell(row: dict[str, Any]) -> str:
    # Rounding may leave the divergence of an exact rule below 0.
    mean, low, high = (max(0.0, value) for value in (row["kl"], *row["kl_95"]))
    return f"**{mean:.4f}** ({low:.4f} to {high:.4f}), {row['top1']:.1%}, {row['accept_length']:.2f}"


def _untitled(name: str) -> str:
    text = (RESULTS / name).read_text(encoding="utf-8")
    return re.sub(r"^## ", "#### ", text.partition("\n")[2].strip(), flags=re.MULTILINE)


def _read(name: str | Path) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(seconds: dict[str, float]) -> str:
    median, low, high = (seconds[key] * 1e3 for key in ("median", "min", "max"))
    digits = 2 if median < 10 else 0
    return f"{median:.{digits}f} ms ({low:.{digits}f} to {high:.{digits}f})"


def _shares(values: list[float]) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def _range(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def _ratio(values: dict[str, float]) -> str:
    return f"**{values['median']:.2f}x** ({values['min']:.2f} to {values['max']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
