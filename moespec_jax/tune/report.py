"""Result of a search: in words, as a table and as a picture."""

from pathlib import Path
from typing import Any

from moespec_jax.files import replacing
from moespec_jax.runtime.tuned_profile import setting_fields
from moespec_jax.tune.search import PLAIN, Bound, Finalist, Outcome


def verdict(outcome: Outcome, bound: Bound) -> str:
    """State the fastest setting and its measured speed."""
    plain = outcome.plain_tokens_per_s["median"]
    if outcome.best is None:
        first = outcome.finalists[0]
        return (
            f"Plain decoding is fastest: {plain:.0f} tokens/s. The fastest speculative setting ({bound_text(bound)}),"
            f" {first.candidate.name}, has {_times(first.over_plain)} of its speed. The profile is plain decoding."
        )
    best = outcome.best
    kind = "EXACT" if best.exact else f"LOSSY ({_loss(best)})"
    return (
        f"{best.candidate.name}, {kind}: {best.tokens_per_s['median']:.0f} tokens/s, {_times(best.over_plain)} of plain"
        f" decoding's {plain:.0f}; {best.accept_length:.2f} tokens a round."
    )


def bound_text(bound: Bound) -> str:
    """State the bound in words."""
    if bound.exact:
        return "exact"
    parts = [] if bound.max_kl is None else [f"divergence of at most {bound.max_kl:g} nats"]
    parts += [] if bound.min_agreement is None else [f"at least {bound.min_agreement:.1%} equal first choices"]
    return " and ".join(parts)


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """List predictions and measurements of the finalists, the fastest first, then those of plain decoding."""
    found: list[dict[str, Any]] = [
        {
            "setting": one.candidate.name,
            **setting_fields(one.candidate.spec.tree, one.candidate.spec.budget),
            "exact": one.exact,
            "predicted_tokens_per_s": round(one.candidate.tokens_per_s, 2),
            "tokens_per_s": _rounded(one.tokens_per_s),
            "predicted_over_measured": round(one.candidate.tokens_per_s / one.tokens_per_s["median"], 4),
            "over_plain": _rounded(one.over_plain),
            "predicted_accept_length": round(one.candidate.accept_length, 4),
            "accept_length": round(one.accept_length, 4),
            "loss": one.candidate.loss,
        }
        for one in outcome.finalists
    ]
    plain = {"setting": PLAIN, **setting_fields(None, None), "exact": True}
    return [*found, plain | {"tokens_per_s": _rounded(outcome.plain_tokens_per_s)}]


def table(outcome: Outcome) -> str:
    """Format finalists and plain decoding as Markdown."""
    head = ["setting (size/depth/top-k)", "output", "predicted tokens/s", "measured", "over plain", "tokens a round"]
    lines = [head + ["divergence", "same first choice"], ["---"] * (len(head) + 2)]
    for one in outcome.finalists:
        loss = one.candidate.loss
        kl, top1 = ("0", "100%") if loss is None else (f"{loss['kl']:.4f}", f"{loss['top1']:.1%}")
        lines.append(
            [
                one.candidate.name, "exact" if one.exact else "LOSSY", f"{one.candidate.tokens_per_s:.0f}",
                _range(one.tokens_per_s), _times(one.over_plain), f"{one.accept_length:.2f}", kl, top1,
            ]
        )  # fmt: skip
    lines.append([PLAIN, "exact", "", _range(outcome.plain_tokens_per_s), "1.00x", "1.00", "0", "100%"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(outcome: Outcome, file: Path) -> None:
    """Draw the measured speed of every finalist with its range, and its predicted speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = outcome.finalists[::-1]
    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.36 * len(shown)), layout="constrained")
    for y, one in enumerate(shown):
        colour = "#0072b2" if one.exact else "#d55e00"
        speed = one.tokens_per_s
        axes.plot([speed["min"], speed["max"]], [y, y], color=colour, linewidth=3, alpha=0.35)
        axes.plot(speed["median"], y, "o", color=colour, label="exact" if one.exact else "lossy")
        axes.plot(one.candidate.tokens_per_s, y, "x", color="0.25", label="predicted")
    plain = outcome.plain_tokens_per_s["median"]
    axes.axvline(plain, color="0.5", linestyle=":", label="plain decoding")
    axes.set_yticks(range(len(shown)), [one.candidate.name for one in shown], fontsize=8)
    axes.set(xlabel="tokens a second (median and range; size/depth/top-k)", xlim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": ""})
    plt.close(figure)


def _loss(finalist: Finalist) -> str:
    loss = finalist.candidate.loss
    assert loss is not None
    low, high = loss["kl_95"]
    return f"divergence {loss['kl']:.4f} nats, {low:.4f} to {high:.4f}; {loss['top1']:.1%} equal first choices"


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _range(values: dict[str, float]) -> str:
    return f"**{values['median']:.0f}** ({values['min']:.0f} to {values['max']:.0f})"


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
