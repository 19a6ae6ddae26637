"""Table of statistics after a run."""

import dataclasses

from moespec_jax.cli.compare import Comparison, SpeedUp
from moespec_jax.decoding.sampling import SamplingConfig
from moespec_jax.runtime.model import Model
from moespec_jax.runtime.results import RunResult, devices_text

NAME_WIDTH = 12
_NEUTRAL = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}


def statistics_table(model: Model, result: RunResult, comparison: Comparison | None) -> str:
    """Format one line for each statistic: model, device, exactness, acceptance, times and experts read."""
    rows = [
        ("model", f"{model.config.model_type} from {model.directory}"),
        ("device", f"{devices_text(result.device, result.mesh)}, {model.precision}, experts by {result.backend}"),
        *_published(result),
        ("output", _output(result)),
        ("exactness", result.exactness),
        ("sampling", _sampling(result)),
        *_drafting(result),
        ("compilation", f"{result.compile_s:.2f} s"),
        ("prefill", f"{result.prefill_s * 1e3:.1f} ms for {_tokens_read(result)} tokens"),
        ("decoding", f"{result.tokens_per_s:.1f} tokens/s"),
        (
            "experts",
            f"{result.experts_read:.1f} of {model.config.num_experts} read per layer and pass{_by_device(result)}"
            f"{_budget_loss(result)}",
        ),
    ]
    if comparison is not None:
        rows.append(("comparison", _compared(comparison)))
    return "\n" + "\n".join(f"{name:{NAME_WIDTH}} {value}" for name, value in rows)


def _tokens_read(result: RunResult) -> int:
    """Tokens of the prompts; the samples of a prompt share them."""
    return sum(prompt.prompt_tokens for prompt in result.prompts[:: result.samples])


def _output(result: RunResult) -> str:
    new, reasons = sum(p.new_tokens for p in result.prompts), {p.finish_reason for p in result.prompts}
    exactness = "LOSSY under an expert budget"
    if result.exact:
        exactness = "exact"
        if result.quantization is not None and not result.keeps_format:
            exactness += f" for the {result.quantization} model, which differs from the checkpoint"
    if result.simulated_accept_length is not None:
        exactness = "SIMULATED acceptance, not the model's output"
    how = "speculative decoding" if result.drafts else "plain decoding"
    return f"{exactness}, {how}; {new} new tokens, ended by {', '.join(sorted(reasons))}"


def _published(result: RunResult) -> list[tuple[str, str]]:
    """Line about weights that the checkpoint has quantized: what became of them."""
    if result.checkpoint_format is None:
        return []
    kept = ", experts kept as published, others" if result.keeps_format else ","
    again = "" if result.quantization is None or result.keeps_format else f", experts to {result.quantization}"
    return [("weights", f"published in {result.checkpoint_format}{kept} dequantized to {result.dtype}{again}")]


def _sampling(result: RunResult) -> str:
    """Settings of sampling that differ from greedy decoding, and which of them the checkpoint sets."""
    options = dict(result.sampling)
    published, ignored = options.pop("published"), options.pop("not_applied")
    changed = {name: value for name, value in options.items() if value != _NEUTRAL.get(name)}
    cuts = ("temperature", "top_k", "top_p", "min_p")
    shown = [f"{n.replace('_', ' ')} {v}" for n, v in changed.items() if not (result.greedy and n in cuts)]
    text = ", ".join((["greedy"] if result.greedy else []) + shown)
    taken = [
        name.replace("_", " ") for name in published if name in changed and (name not in cuts or not result.greedy)
    ]
    text += f"; by generation_config.json: {', '.join(taken)}" if taken else ""
    return text + (f"; not applied: {', '.join(f'{n} {v}' for n, v in ignored.items())}" if ignored else "")


def _by_device(result: RunResult) -> str:
    return "" if result.mesh is None else f", at most {result.experts_max_per_device:.1f} by one device"


def _budget_loss(result: RunResult) -> str:
    if result.budget is None:
        return ""
    return (
        f", {result.experts_wanted:.1f} selected; {result.mass_kept:.0%} of the scores kept,"
        f" {result.tokens_replaced:.0%} of tokens lost an expert"
    )


def _drafting(result: RunResult) -> list[tuple[str, str]]:
    """Lines about drafter, tree and acceptance, over all rounds of all prompts."""
    rounds = sum(p.rounds for p in result.prompts)
    if not result.drafts or not rounds:
        return []
    depths = range(max(len(p.accepted_by_depth) for p in result.prompts))
    shares = [sum(p.accepted_by_depth[d] * p.rounds for p in result.prompts) / rounds for d in depths]
    simulated = "" if result.simulated_accept_length is None else " (simulated)"
    return [
        ("draft", f"{result.draft_model}; {_shape(result)}"),
        (
            "acceptance",
            f"{1 + sum(shares):.2f} tokens a round{simulated}; by depth {' '.join(f'{s:.2f}' for s in shares)}",
        ),
    ]


def _shape(result: RunResult) -> str:
    """Shape of the tree or, where every round chose one, the share of each."""
    if result.tree is None:
        assert result.choice is not None
        rounds = result.choice["rounds"]
        total = max(sum(rounds.values()), 1)
        shares = ", ".join(f"{name} {count / total:.0%}" for name, count in rounds.items() if count)
        predicted = result.choice["predicted_s"]
        times = "" if predicted is None else f"; predicted {predicted:.2f} s, measured {result.decode_s:.2f} s"
        return f"chosen each round ({shares}){times}; costs: {result.choice['source']}"
    tree = result.tree
    shape = "chain" if tree["top_k"] == 1 else f"tree of top-k {tree['top_k']}"
    return f"{shape}, depth {tree['depth']}, {tree['size']} tokens a pass"


def _compared(comparison: Comparison) -> str:
    same = "" if comparison.same_tokens is None else f"; same tokens as plain decoding: {comparison.same_tokens:.1%}"
    text = f"{_ratio(comparison.over_plain)} of plain decoding's {comparison.plain_tokens_per_s:.1f} tokens/s"
    if comparison.over_exact is not None:
        text += f", {_ratio(comparison.over_exact)} of exact speculation's {comparison.exact_tokens_per_s:.1f}"
    if comparison.over_fixed is not None:
        text += f", {_ratio(comparison.over_fixed)} of {comparison.fixed}'s {comparison.fixed_tokens_per_s:.1f}"
    return f"{text}; median and range of {comparison.repeats} runs{same}"


def _ratio(ratio: SpeedUp) -> str:
    return f"{ratio.median:.2f}x ({ratio.min:.2f} to {ratio.max:.2f})"
