"""The reports of `tpu_compile.py`, `tpu_speculate.py` and `tpu_verify.py` as Markdown."""

from typing import Any


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    head = (
        "# Our programs under the TPU compiler\n\nMade by `benchmarks/tpu_compile.py`, whose top explains every column."
        f" {versions}; {report['dtype']}, batch 1, cache of {report['slots']} slots, one chip. Nothing was run.\n\n"
    )
    return head + _decode_table(report["rows"]) + "\n" + _prefill_table(report)


def _decode_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "## One token\n",
        "| model | chip | back-end | layers | MB/token | ideal | ratio | temp MB | cache in place | large copies |"
        " large activations | compile s |",
        "|" + " --- |" * 12,
    ]
    for row in (row for row in rows if row["program"] == "decode"):
        lines.append(
            f"| {row['model']} | {row['chip']} | {row['backend']} | {_layers(row)} | {row['bytes_mb']:.0f} |"
            f" {row['ideal_mb']:.0f} | {row['ratio']:.2f} | {row['temp_mb']:.1f} |"
            f" {'yes' if row['cache_aliased'] else 'no'} | {len(row['large_copies'])} |"
            f" {len(row['large_activations'])} | {row['compile_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _prefill_table(report: dict[str, Any]) -> str:
    lines = [
        f"## A chunk of {report['chunk']} prompt tokens\n",
        "| model | chip | layers | temp MB | cache in place | large copies | large activations | compile s |",
        "|" + " --- |" * 8,
    ]
    for row in (row for row in report["rows"] if row["program"] == "prefill"):
        lines.append(
            f"| {row['model']} | {row['chip']} | {_layers(row)} | {row['temp_mb']:.1f} |"
            f" {'yes' if row['cache_aliased'] else 'no'} | {len(row['large_copies'])} |"
            f" {_summary(row['large_activations'])} | {row['compile_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _summary(values: list[str]) -> str:
    return f"{len(values)}, the largest {values[0]}" if values else "0"


def _layers(row: dict[str, Any]) -> str:
    if row["fits"]:
        return f"{row['layers_compiled']}"
    return f"{row['layers_compiled']} of {row['layers']}: does not fit one chip, needs {row['needs_gb']:.1f} GB"


def speculation_table(report: dict[str, Any]) -> str:
    """The report of `tpu_speculate.py` as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    trees = ", ".join(f"{name} {t['size']}/{t['depth']}/{t['top_k']}" for name, t in report["trees"].items())
    lines = [
        "# A speculative round under the TPU compiler\n",
        "Made by `benchmarks/tpu_speculate.py`, whose top explains every column. The whole round is one program: draft,"
        f" verify, accept, keep, in one `lax.while_loop`. {versions}; {report['dtype']}, batch 1, caches of"
        f" {report['slots']} slots; trees as size/depth/top-k: {trees}; one chip. Nothing was run.\n",
        "| model | chip | back-end | tree | budget | GB | temp MB | caches in place | large copies |"
        " large activations | compile s |",
        "|" + " --- |" * 11,
    ]
    for row in report["rows"]:
        drawn = "" if row["sampling"] == "greedy" else f", {row['sampling']}"
        lines.append(
            f"| {row['model']} | {row['chip']} | {row['backend']} | {row['tree']}{drawn} |"
            f" {row['budget']} | {row['memory_gb']:.2f} | {row['temp_mb']:.1f} |"
            f" {'yes' if row['cache_aliased'] else 'no'} | {_summary(row['large_copies'])} |"
            f" {_summary(row['large_activations'])} | {row['compile_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def verification_table(report: dict[str, Any]) -> str:
    """The report of `tpu_verify.py` as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    tree = "{size}/{depth}/{top_k}".format(**report["tree"])
    lines = [
        "# A verification under an expert budget under the TPU compiler\n",
        "Made by `benchmarks/tpu_verify.py`, whose top explains every column. One forward pass of the target over a"
        f" tree of {tree} (size/depth/top-k). {versions}; {report['dtype']}, batch 1, cache of {report['slots']} slots,"
        " one chip, back-end `pallas`. Nothing was run.\n",
        "| model | chip | layers | budget | experts | ideal MB | HBM MB | HBM / ideal | count MB | count / ideal |"
        " temp MB | cache in place | large copies | large activations | compile s |",
        "|" + " --- |" * 15,
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['model']} | {row['chip']} | {_layers(row)} | {row['budget']} | {row['experts']} |"
            f" {row['ideal_mb']:.0f} | {row['hbm_mb']:.0f} | {row['hbm_ratio']:.2f} | {row['bytes_mb']:.0f} |"
            f" {row['ratio']:.2f} | {row['temp_mb']:.1f} | {'yes' if row['cache_aliased'] else 'no'} |"
            f" {_summary(row['large_copies'])} | {_summary(row['large_activations'])} | {row['compile_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"
