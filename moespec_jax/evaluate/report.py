"""Report of the rows in Markdown: a table for each set of texts and of questions."""

from collections.abc import Sequence
from typing import Any

from moespec_jax.measure.markdown import markdown_table
from moespec_jax.runtime.drafters import described
from moespec_jax.runtime.results import devices_text

_TEXTS = (
    "decoding", "output", "divergence", "same first choice", "perplexity", "bits per byte", "nats lost per token",
    "tokens a round", "experts read (selected)",
)  # fmt: skip
_ANSWERS = ("decoding", "output", "correct", "accuracy", "lost, gained against plain", "p")


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Format model, device and budget rule, the tables, and notes on how to read them."""
    parts = [heading(rows[0])]
    parts += [f"Budgets by {rule_text(row['budget'])}." for row in rows if row["budget"] is not None][:1]
    for part in groups(rows):
        first = part[0]
        of_texts = first["measured"] == "texts"
        cells = [_TEXTS, *map(text_cells, part)] if of_texts else [_ANSWERS, *map(answer_cells, part)]
        parts += [_title(first), markdown_table(cells)]
    kinds = {row["measured"] for row in rows}
    parts += [_READING[kind] for kind in ("texts", "answers") if kind in kinds]
    if any(row["measured"] == "texts" and row["rounds"] is None for row in rows):
        parts.append(_READING["plain passes"])
    return "\n\n".join(parts) + "\n"


def heading(row: dict[str, Any]) -> str:
    """Format model, device and versions."""
    jax, own = row["versions"]["jax"], row["versions"]["moespec_jax"]
    drafts, devices = described(row["draft_model"]), devices_text(row["device"], row["mesh"])
    return f"{row['model']} with {drafts}; {devices}, {row['dtype']}, jax {jax}, moespec_jax {own}"


def rule_text(budget: dict[str, Any]) -> str:
    """Format the rule of a budget by the names of its flags; numbers that have no effect are omitted."""
    names = [f"{name} {budget[name]}" for name in ("coverage", "score", "credit", "anchor", "size")]
    effective = {
        "mass": budget["size"] == "mass",
        "anchor_probability": budget["anchor"] == "likely",
        "min_kept_weight": budget["min_kept_weight"] > 0,
        "groups": budget["groups"] > 1,
    }
    numbers = [f"{name.replace('_', ' ')} {budget[name]:g}" for name, used in effective.items() if used]
    return ", ".join(names + numbers)


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group rows by set, in order."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["measured"], row["set"], row["kind"]), []).append(row)
    return list(found.values())


def output_word(row: dict[str, Any]) -> str:
    """Describe the output: `exact` or `LOSSY`."""
    return "exact" if row["exact"] else "LOSSY"


def text_cells(row: dict[str, Any]) -> list[str]:
    """Format the cells of a row about texts."""
    bits, tokens = row["bits_per_byte"], row["accept_length"]
    return [
        row["way"],
        output_word(row),
        within(row, "kl", "{:.6f}" if tokens is None else "{:.4f}"),  # forms of the weights differ by little
        within(row, "top1", "{:.1%}"),
        within(row, "perplexity", "{:.3f}"),
        "" if bits is None else within(row, "bits_per_byte", "{:.3f}"),
        within(row, "nats_lost", "{:.4f}"),
        "" if tokens is None else f"{tokens:.2f}",
        "" if tokens is None else f"{row['experts_read']:.1f} ({row['experts_wanted']:.1f})",
    ]


def answer_cells(row: dict[str, Any]) -> list[str]:
    """Format the cells of a row about answers."""
    against = "" if row["way"] == "plain" else f"{row['lost']}, {row['gained']}"
    p = "" if row["way"] == "plain" else f"{row['mcnemar_p']:.3f}"
    return [
        row["way"],
        output_word(row),
        f"{row['right']} of {row['questions']}",
        within(row, "accuracy", "{:.1%}"),
        against,
        p,
    ]


def within(row: dict[str, Any], name: str, form: str) -> str:
    """Format a value and its 95 % interval: `0.12 (0.10 to 0.14)`."""
    texts = [form.format(value) for value in (row[name], *row[f"{name}_95"])]
    texts = [text.lstrip("-") if not text.strip("-0.%") else text for text in texts]  # no -0.000
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def _title(row: dict[str, Any]) -> str:
    if row["measured"] == "texts":
        return f"{row['set']}, {row['kind']}: {row['texts']} texts, {row['positions']} positions."
    left_out = [f"{count} left out: {reason}" for reason, count in row["left_out"].items()]
    return f"{row['set']}: " + "; ".join([f"{row['questions']} questions ({row['kind']})", *left_out]) + "."


_READING = {
    "texts": (
        "Divergence: KL(exact || verified) of the distribution of the next token after the same text, in nats. Same"
        " first choice: share of positions with the same most probable token. Nats lost: mean log-probability of the"
        " text's tokens by exact verification, minus that of this row. Tokens a round: tokens of the text that a round"
        " commits; on the target's own text those that greedy decoding would accept. Experts: distinct experts per"
        " layer and round. In parentheses: 95 % bootstrap interval over texts."
    ),
    "plain passes": (
        "Plain: one pass over each text by the target as it was loaded first. Plain, with a name: by the target loaded"
        " a second way; divergence, first choices and lost nats are against the first way's plain pass."
    ),
    "answers": (
        "Greedy answers. In parentheses: Wilson's 95 % interval. Lost: questions that plain decoding answers correctly"
        " and this row does not; gained: the opposite; p: McNemar's exact test of their difference."
    ),
}
