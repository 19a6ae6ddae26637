"""Report of the rows in Markdown: a table for each set of prompts and batch size."""

from collections.abc import Sequence
from typing import Any

from moespec_jax.measure.markdown import markdown_table
from moespec_jax.runtime.drafters import described
from moespec_jax.runtime.results import devices_text

HEAD = (
    "tree", "budget", "output", "tokens/s", "over plain", "over exact, same tree", "over best exact", "tokens a round",
    "experts read (selected)", "mass kept", "text as plain's", "copy bandwidth: round, verification", "compile s",
)  # fmt: skip


_ON_A_MESH = (
    " On a mesh these are the weights that a device reads on average, and what is exchanged are the results of all"
    " collectives of a round on one device."
)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Format model and device, the tables, and a note on how to read them."""
    sections = [heading(rows[0])]
    for part in groups(rows):
        first, exact = part[0], part[0]["best_exact"]
        title = f"{first['prompts']}: {first['count']} prompts, {first['new_tokens']} new tokens each"
        title += f", batches of {first['batch_size']}" if first["batch_size"] > 1 else ""
        cells = [HEAD, *([*map(str, cells_of(row))] for row in part)]
        if first["mesh"] is not None:
            exchanged = ["exchanged, MB a round", *map(_exchanged, part)]
            cells = [[*line, cell] for line, cell in zip(cells, exchanged, strict=True)]
        sections += [f"{title}. Best exact setting, by median speed: **{exact}**.", markdown_table(cells)]
    return "\n\n".join([*sections, footing(rows[0])]) + "\n"


def heading(row: dict[str, Any]) -> str:
    """Format model, device and versions, after a notice where acceptance and routing are simulated."""
    text = (
        f"{row['model']} with {described(row['draft_model'])} ({row['weights']});"
        f" {devices_text(row['device'], row['mesh'])}, {row['dtype']},"
        f" jax {row['versions']['jax']}, moespec_jax {row['versions']['moespec_jax']}"
    )
    if row["simulated"]:
        text = f"SIMULATED acceptance and SIMULATED routing skew: times are real, texts are meaningless.\n\n{text}"
    return text


def footing(row: dict[str, Any]) -> str:
    """Explain how to read the tables."""
    return (
        f"Greedy decoding; median and range of {row['repeats']} turns in one process; ratios are of speeds in the same"
        " turn, without prefill and compilation. Experts: distinct experts per layer and pass, of"
        f" {row['num_experts']}. Copy bandwidth: time to read the verification's weights at the"
        f" {row['copy_gb_per_s']:.1f} GB/s of a copy on this device, over the time of a round, and over that of the"
        " verification alone; caches can make it more than 100%." + ("" if row["mesh"] is None else _ON_A_MESH)
    )


def _exchanged(row: dict[str, Any]) -> str:
    return "" if row["exchanged_mb"] is None else f"{row['exchanged_mb']:.3g}"


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group rows by prompts and batch size, in order."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["prompts"], row["batch_size"]), []).append(row)
    return list(found.values())


def output_word(row: dict[str, Any]) -> str:
    """Describe the output: `exact`, `LOSSY` or `simulated`."""
    if row["simulated"]:
        return "simulated"
    return "exact" if row["exact"] else "LOSSY"


def cells_of(row: dict[str, Any]) -> list[str]:
    """Format the cells of a row, in the order of `HEAD`."""
    same, verify = row["same_tokens_as_plain"], row["verify_share_of_copy_bandwidth"]
    shares = f"{row['round_share_of_copy_bandwidth']['median']:.0%}"
    return [
        _shape(row),
        row["expert_budget"] or "none",
        output_word(row),
        spread_text(row["output_throughput"], "{:.1f}"),
        *(spread_text(row[name], "{:.2f}") for name in ("over_plain", "over_exact_same_tree", "over_best_exact")),
        f"{row['accept_length']:.2f}",
        f"{row['experts_read']:.1f} ({row['experts_wanted']:.1f})",
        f"{row['mass_kept']:.0%}",
        "" if same is None or row["simulated"] else f"{same:.0%}",
        shares if verify is None else f"{shares}, {verify['median']:.0%}",
        f"{row['compile_s']:.1f}",
    ]


def _shape(row: dict[str, Any]) -> str:
    """Tree of a row or, where every round chose one, the share of each."""
    if row["choice"] is None:
        return row["tree"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["choice"]["share_of_rounds"].items() if share)
    return f"{row['tree']} ({shares})"


def spread_text(values: dict[str, float], form: str) -> str:
    """Format median and range: `1.20 (1.10 to 1.25)`."""
    median, low, high = (form.format(values[name]) for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"
