"""Result of a run: texts and tokens, seconds of each part, experts read, and whether it is exact."""

import dataclasses
import importlib.metadata
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moespec_jax.runtime.token_logprobs import TokenLogprob


@dataclasses.dataclass
class PromptResult:
    """Continuation of one prompt.

    Fields:
        text: None where there is no tokenizer.
        token_ids: new tokens, a stop id included.
        prompt_tokens: length of the prompt.
        new_tokens: number of new tokens.
        rounds: the target's forward passes after prefill.
        accept_length: mean number of tokens that a round gained, the drafted ones it accepted and one more, even if a
            stop id or the limit cut some off; 1 in plain decoding.
        accepted_by_depth: share of rounds that accepted a drafted token at depth 1, 2, ...
        finish_reason: "stop" (a stop id), "stop string" (which the text does not have, but `token_ids` do), "length"
            (`max_new_tokens`) or "context".
        cached_tokens: tokens of the prompt that were in the prompt cache, and were not read.
        sample: number of this continuation among the samples of its prompt, from 0.
        logprobs: of every new token, None if they were not asked for.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    accept_length: float
    accepted_by_depth: list[float]
    finish_reason: str
    cached_tokens: int = 0
    sample: int = 0
    logprobs: list[TokenLogprob] | None = None

    def __repr__(self) -> str:
        return (
            f"PromptResult({self.new_tokens} tokens after {self.prompt_tokens}, ended by {self.finish_reason},"
            f" {self.accept_length:.2f} tokens a round, text {reprlib.repr(self.text)})"
        )


@dataclasses.dataclass
class RunResult:
    """Result of one batch. Numbers of experts are means over rounds and sparse layers.

    Fields:
        prompts: one result for each prompt, or for each of its samples.
        experts_wanted: distinct experts that a layer's rows selected.
        experts_read: distinct experts that were read.
        experts_max_per_device: the most that one device of the mesh read.
        mass_kept: under a budget, the shortlists' share of the scores that ranked the experts.
        tokens_replaced: share of rows, over layers, that lost an expert of their own.
        exact: whether the distribution of the output is the model's own, that of the quantized one where there is a
            `quantization`; ties and near-ties of tokens are subject to rounding.
        exactness: what `exact` means for this output, in words.
        greedy: whether the most probable token was always taken.
        sampling: fields of the `SamplingConfig`; names of those that the checkpoint sets (`published`); fields of its
            `generation_config.json` that would change the text and are not implemented (`not_applied`).
        budget: fields of the `BudgetConfig`, None without one.
        tree: fields of the `TreeConfig`, None where nothing was drafted.
        draft_model: name of the draft head or drafter.
        simulated_accept_length: if not None, the tokens are not the model's, and only times mean anything.
        compile_s: seconds of compilation and of the first execution of new programs, which is slower than later ones.
        prefill_s, decode_s: seconds without those.
        tokens_per_s: tokens after the first of each sequence over `decode_s`.
        mesh: devices along each axis, None for one device.
        device, dtype, quantization, versions: where and how it ran.
        backend: expert compute that ran; a back-end's kernels do not run with everything.
        choice: where every round chose its shape: `rounds` of each shape, and the seconds and gained tokens of a round
            of each that decided (`round_s`, `gains`), measured in this run or read from a file (`source`);
            `predicted_s`, the seconds of all rounds by these costs, is to be compared with `decode_s`.
        samples: of each prompt.
        logprobs_of: the distribution that `PromptResult.logprobs` are of, in words; None if they were not asked for.
        checkpoint_format: in which the checkpoint's weights are quantized; they were dequantized when they were loaded,
            but for experts whose `quantization` is that format. None for plain weights.
    """

    prompts: list[PromptResult]
    experts_wanted: float
    experts_read: float
    experts_max_per_device: float
    mass_kept: float
    tokens_replaced: float
    exact: bool
    exactness: str
    greedy: bool
    sampling: dict[str, Any]
    budget: dict[str, Any] | None
    tree: dict[str, Any] | None
    draft_model: str | None
    simulated_accept_length: float | None
    compile_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    mesh: dict[str, int] | None
    device: str
    dtype: str
    quantization: str | None
    backend: str
    versions: dict[str, str]
    choice: dict[str, Any] | None = None
    samples: int = 1
    logprobs_of: str | None = None
    checkpoint_format: str | None = None

    @property
    def keeps_format(self) -> bool:
        """Test whether the experts are kept in the checkpoint's own format, so that quantization changes nothing."""
        return self.quantization == "mxfp4" and (self.checkpoint_format or "").startswith("MXFP4")

    @property
    def drafts(self) -> bool:
        """Whether rounds drafted a tree, or chose whether to."""
        return self.tree is not None or self.choice is not None

    def __repr__(self) -> str:
        new, decoding = sum(p.new_tokens for p in self.prompts), "speculative" if self.drafts else "plain"
        kind = "exact" if self.exact else "not exact"
        return (
            f"RunResult({len(self.prompts)} prompts, {new} new tokens, {kind} {decoding} decoding,"
            f" {self.tokens_per_s:.1f} tokens/s, {self.device})"
        )


def exactness(exact: bool, tree: object, budget: object, simulated: float | None, dtype: str) -> str:
    """Describe what `exact` means for an output."""
    if simulated is not None:
        return "acceptance is simulated: the tokens are not the target's"
    if not exact and budget is None:
        return "a function of the round was replaced: the distribution may not be the target's"
    if not exact:
        return "lossy under the expert budget: the distribution is in general not the target's"
    passes = "batches of other sizes" if tree is None else "rows of different passes"
    return (
        f"the distribution is the target's; {passes} round differently in {dtype}, so a tie or near-tie of two tokens"
        " may fall otherwise"
    )


def logprobs_of(exact: bool, budget: object, adapt: object) -> str:
    """Describe the distribution that log-probabilities are of."""
    raw = "log-softmax of raw logits, before penalties, temperature, top-k, top-p and min-p"
    if exact or (budget is None and adapt is None):
        return f"the target: {raw}"
    if budget is not None:
        return f"the target under the expert budget, but for the first token, which the prompt gives: {raw}"
    return f"the target, with the replaced functions of the round: {raw}"


def joined(results: Sequence[RunResult], order: Sequence[tuple[int, int]]) -> RunResult:
    """Join the results of successive batches that were decoded in the same way.

    Args:
        results: of each batch.
        order: batch and place within it of each prompt of the joined result.
    """
    weights = [max(1, *(p.rounds for p in r.prompts)) for r in results]
    means = ("experts_wanted", "experts_read", "experts_max_per_device", "mass_kept", "tokens_replaced")
    sums = ("compile_s", "prefill_s", "decode_s")
    fields: dict[str, Any] = {
        name: sum(w * getattr(r, name) for w, r in zip(weights, results, strict=True)) / sum(weights) for name in means
    }
    fields |= {name: sum(getattr(r, name) for r in results) for name in sums}
    later = sum(p.new_tokens - 1 for r in results for p in r.prompts)
    least = next((r for r in results if not r.exact), results[0])
    return dataclasses.replace(
        least, prompts=[results[batch].prompts[place] for batch, place in order], choice=_joined_choice(results),
        tokens_per_s=later / fields["decode_s"] if fields["decode_s"] else 0.0, **fields,
    )  # fmt: skip


def _joined_choice(results: Sequence[RunResult]) -> dict[str, Any] | None:
    """Sum rounds and predicted seconds of all batches; the costs are those that the last one was decided by."""
    choices = [result.choice for result in results if result.choice is not None]
    if not choices:
        return None
    seconds = [choice["predicted_s"] for choice in choices if choice["predicted_s"] is not None]
    predicted = sum(seconds) if len(seconds) == len(results) else None
    return choices[-1] | {"rounds": rounds_by_shape(choices), "predicted_s": predicted}


def rounds_by_shape(choices: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Sum the rounds of each shape over the `choice` of at least one result."""
    return {name: sum(choice["rounds"][name] for choice in choices) for name in choices[0]["rounds"]}


def device_name() -> str:
    """Platform and kind of the first device: `cpu (cpu)`, `gpu (NVIDIA H100 80GB HBM3)`."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"


def devices_text(device: str, mesh: Mapping[str, int] | None) -> str:
    """Name the devices of a result: `8 x tpu (TPU v5 lite) (data 1, expert 4, tensor 2)`; one device by its name."""
    if mesh is None:
        return device
    return f"{math.prod(mesh.values())} x {device} ({', '.join(f'{axis} {size}' for axis, size in mesh.items())})"


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that a result depends on."""
    import moespec_jax

    names = ("jax", "jaxlib", "flax", "transformers")
    # Our own from the source: a checkout that was never installed has no metadata.
    return {name: importlib.metadata.version(name) for name in names} | {"moespec_jax": moespec_jax.__version__}
