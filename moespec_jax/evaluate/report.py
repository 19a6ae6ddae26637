"""The rows as tables for people, in Markdown."""

from collections.abc import Sequence
from typing import Any

from moespec_jax.measure.markdown import markdown_table

_TEXTS = (
    "decoding", "output", "divergence", "same first choice", "perplexity", "bits a byte", "nats lost a token",
    "tokens a round", "experts read (wanted)",
)  # fmt: skip
_ANSWERS = ("decoding", "output", "right", "accuracy", "lost, gained against plain", "p")


def report(rows: Sequence[dict[str, Any]]) -> str:
    """What was measured on what, a table for each set of texts and of questions, and how to read them."""
    parts = [heading(rows[0])]
    parts += [f"Budgets by {rule_text(row['budget'])}." for row in rows if row["budget"] is not None][:1]
    for part in groups(rows):
        first = part[0]
        of_texts = first["measured"] == "texts"
        cells = [_TEXTS, *map(text_cells, part)] if of_texts else [_ANSWERS, *map(answer_cells, part)]
        parts += [_title(first), markdown_table(cells)]
    kinds = {row["measured"] for row in rows}
    parts += [_READING[kind] for kind in ("texts", "answers") if kind in kinds]
    return "\n\n".join(parts) + "\n"


def heading(row: dict[str, Any]) -> str:
    """Model, device and versions."""
    head = "no draft head" if row["draft_model"] is None else f"draft head {row['draft_model']}"
    jax, own = row["versions"]["jax"], row["versions"]["moespec_jax"]
    return f"{row['model']} with {head}; {row['device']}, {row['dtype']}, jax {jax}, moespec_jax {own}"


def rule_text(budget: dict[str, Any]) -> str:
    """A rule, in the words of its flags."""
    names = {"policy": "coverage"} | {name: name for name in ("score", "credit", "anchor", "size")}
    said = [f"{flag} {budget[name]}" for flag, name in names.items()]
    used = {
        "mass": budget["size"] == "mass",
        "guarantee": budget["coverage"] == "guarantee",
        "faithfulness": budget["faithfulness"] > 0,
        "groups": budget.get("groups", 1) > 1,
    }
    return ", ".join(said + [f"{name} {budget[name]:g}" for name in used if used[name]])


def groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one set each, in order."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["measured"], row["set"], row["kind"]), []).append(row)
    return list(found.values())


def output_word(row: dict[str, Any]) -> str:
    """Whether what comes out is the model's own."""
    return "exact" if row["exact"] else "LOSSY"


def text_cells(row: dict[str, Any]) -> list[str]:
    """One line of a table of texts."""
    bits = row["bits_per_byte"]
    return [
        row["way"],
        output_word(row),
        within(row, "kl", "{:.4f}"),
        within(row, "top1", "{:.1%}"),
        within(row, "perplexity", "{:.3f}"),
        "" if bits is None else within(row, "bits_per_byte", "{:.3f}"),
        within(row, "nats_lost", "{:.4f}"),
        f"{row['accept_length']:.2f}",
        f"{row['experts_read']:.1f} ({row['experts_wanted']:.1f})",
    ]


def answer_cells(row: dict[str, Any]) -> list[str]:
    """One line of a table of answers."""
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
    """`0.12 (0.10 to 0.14)`."""
    texts = [form.format(value) for value in (row[name], *row[f"{name}_95"])]
    texts = [text.lstrip("-") if not text.strip("-0.%") else text for text in texts]  # no -0.000
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def _title(row: dict[str, Any]) -> str:
    if row["measured"] == "texts":
        return f"{row['set']}, {row['kind']}: {row['texts']} texts, {row['positions']} positions."
    left = [f"{count} left out: {reason}" for reason, count in row["left_out"].items()]
    return f"{row['set']}: " + "; ".join([f"{row['questions']} questions ({row['kind']})", *left]) + "."


_READING = {
    "texts": (
        "Divergence: KL of the verified from the exact distribution of the next token, in nats, after the same text;"
        " same first choice: how often greedy decoding would go on alike there. Nats lost: how much less likely a token"
        " of the text is than by exact verification. Tokens a round: of the text, which greedy decoding would take"
        " where it is the target's own. Experts: distinct ones a layer and round. In brackets 95 % of a bootstrap over"
        " texts."
    ),
    "answers": (
        "Greedy answers. In brackets Wilson's 95 % interval. Lost and gained: questions that plain decoding alone"
        " answers rightly, and that this way alone does; p: McNemar's exact test, that a coin decided them."
    ),
}
